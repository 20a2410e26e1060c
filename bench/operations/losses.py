"""Losses of policies, critics, preferences and reward models."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warpo.bench import peers
from warpo.bench.operation import Inputs, Operation, Provider, Sizes, Work, first_rows
from warpo.kernels import ops, reference

_TOKENS: dict[str, Any] = {
    "sizes": ("sequences", "steps"),
    "tiny": {"sequences": 2, "steps": 4},
    "part": first_rows(4),
    "mask": "mask",
}
_PAIRS: dict[str, Any] = {"sizes": ("pairs",), "tiny": {"pairs": 2}, "part": first_rows(64)}


def tokens(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Logprobs of three policies that are near each other, advantages, values, and a mask of nine
    tenths of the tokens.
    """
    shape = (sizes["sequences"], sizes["steps"])
    old = -torch.rand(shape, device=device)
    values = torch.randn(shape, device=device)
    return {
        "logprobs": old + 0.1 * torch.randn(shape, device=device),
        "old_logprobs": old,
        "ref_logprobs": old + 0.05 * torch.randn(shape, device=device),
        "advantages": torch.randn(shape[0], device=device),
        "values": values,
        "old_values": values + 0.3 * torch.randn(shape, device=device),
        "returns": values + torch.randn(shape, device=device),
        "desirable": torch.rand(shape[0], device=device) < 0.5,
        "mask": torch.rand(shape, device=device) < 0.9,
    }


def pairs(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Sums of logprobs, or scores, of chosen and rejected answers."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    return {name: -5 * torch.rand(sizes["pairs"], device=device) for name in names}


def _of_tokens(fwd: tuple[int, int], bwd: tuple[int, int]) -> Any:
    """Bytes of a token that are read and written, forward and in the backward pass after it."""

    def work(sizes: Sizes, itemsize: int, mode: str) -> Work:
        count = sizes["sequences"] * sizes["steps"]
        read, written = fwd if mode == "fwd" else bwd
        if mode == "fwd+bwd":
            read, written = max(fwd[0], bwd[0]), max(fwd[1], bwd[1])
        return Work(read=count * read, written=count * written)

    return work


def _of_pairs(inputs: int) -> Any:
    def work(sizes: Sizes, itemsize: int, mode: str) -> Work:
        count = sizes["pairs"]
        return Work(
            read=4 * inputs * count,
            written=0 if mode == "fwd" else 8 * count,
            exps=2 * count,
        )

    return work


def _count(inputs: Inputs, name: str = "logprobs") -> Tensor:
    rows = len(inputs[name])
    return torch.tensor(float(rows), dtype=inputs[name].dtype, device=inputs[name].device)


def grpo(inputs: Inputs) -> Tensor:
    """The loss of GRPO with the k3 KL, as one writes it."""
    logp, mask = inputs["logprobs"], inputs["mask"]
    advantages = inputs["advantages"][:, None]
    ratio = (logp - inputs["old_logprobs"]).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    difference = inputs["ref_logprobs"] - logp
    loss = 0.04 * (difference.exp() - difference - 1) - surrogate
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def _exact_grpo(inputs: Inputs) -> Tensor:
    logp = inputs["logprobs"]
    return reference.policy_loss(
        logp, inputs["old_logprobs"], inputs["advantages"][:, None].expand_as(logp),
        ops.OBJECTIVES["grpo"], _count(inputs), mask=inputs["mask"], ref=inputs["ref_logprobs"],
    )[0]  # fmt: skip


def _trl() -> Any:
    function = peers.trl_grpo_loss(beta=0.04)
    return lambda inputs: function(
        inputs["logprobs"], inputs["old_logprobs"], inputs["ref_logprobs"], inputs["advantages"],
        inputs["mask"].long(),
    )  # fmt: skip


def _value(inputs: Inputs) -> Tensor:
    values, old, returns, mask = (inputs[n] for n in ("values", "old_values", "returns", "mask"))
    cut = old + (values - old).clamp(-0.2, 0.2)
    loss = torch.max((values - returns) ** 2, (cut - returns) ** 2)
    return 0.5 * (loss * mask).sum() / mask.sum()


def _exact_value(inputs: Inputs) -> Tensor:
    count = inputs["mask"].sum().to(inputs["values"].dtype)
    return reference.value_loss(
        inputs["values"], inputs["old_values"], inputs["returns"], count, mask=inputs["mask"],
        clip_range=0.2,
    )[0]  # fmt: skip


def _mean(inputs: Inputs) -> Tensor:
    mask = inputs["mask"]
    return torch.where(mask, inputs["logprobs"], 0.0).sum() / mask.sum()


def _k3(inputs: Inputs) -> Tensor:
    difference = inputs["ref_logprobs"] - inputs["logprobs"]
    return (difference.exp() - difference - 1).clamp(-10, 10)


def _kto(inputs: Inputs) -> Tensor:
    rewards = ((inputs["logprobs"] - inputs["ref_logprobs"]) * inputs["mask"]).sum(1)
    signs = inputs["desirable"].to(rewards.dtype) * 2 - 1
    return (1 - torch.sigmoid(0.1 * signs * (rewards - 0.5))).mean()


def _dpo(inputs: Inputs) -> Tensor:
    chosen = inputs["chosen"] - inputs["ref_chosen"]
    rejected = inputs["rejected"] - inputs["ref_rejected"]
    return -functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def _ours_dpo(inputs: Inputs, backend: str) -> Any:
    return ops.preference_loss(
        inputs["chosen"][:, None], inputs["rejected"][:, None], inputs["ref_chosen"][:, None],
        inputs["ref_rejected"][:, None], loss="dpo", backend=backend,
    ).loss  # fmt: skip


def _exact_dpo(inputs: Inputs) -> Tensor:
    return reference.preference_loss(
        inputs["chosen"][:, None], inputs["rejected"][:, None], inputs["ref_chosen"][:, None],
        inputs["ref_rejected"][:, None], _count(inputs, "chosen"),
    )[0]  # fmt: skip


def _ranked(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Groups of answers with scores and ranks."""
    prompts, group = sizes["prompts"], sizes["group"]
    return {
        "scores": torch.randn(prompts, group, device=device),
        "ranks": torch.rand(prompts, group, device=device).argsort(1),
    }


def _offsets(inputs: Inputs) -> Tensor:
    prompts, group = inputs["scores"].shape
    ends = torch.arange(prompts + 1, dtype=torch.int32, device=inputs["scores"].device)
    return ends * group


def _ranking(inputs: Inputs) -> Tensor:
    scores, ranks = inputs["scores"], inputs["ranks"]
    better = ranks[:, :, None] < ranks[:, None, :]
    losses = -functional.logsigmoid(scores[:, :, None] - scores[:, None, :]) * better
    group = scores.shape[1]
    return losses.sum() / (group * (group - 1) / 2) / len(scores)


OPERATIONS = (
    Operation(
        name="policy_loss",
        **_TOKENS,
        make=tokens,
        leaves=("logprobs",),
        ours=lambda inputs, backend: ops.policy_loss(
            inputs["logprobs"], inputs["old_logprobs"], inputs["advantages"], "grpo",
            mask=inputs["mask"], ref_logprobs=inputs["ref_logprobs"], backend=backend,
        ).loss,
        eager=grpo,
        exact=_exact_grpo,
        others={"trl": Provider(load=_trl)},
        # read three logprobs (4 bytes each) and mask (1); backward: scale the gradient (4 and 4)
        work=_of_tokens((13, 0), (13, 4)),
    ),
    Operation(
        name="value_loss",
        **_TOKENS,
        make=tokens,
        leaves=("values",),
        ours=lambda inputs, backend: ops.value_loss(
            inputs["values"], inputs["old_values"], inputs["returns"], mask=inputs["mask"],
            clip_range=0.2, backend=backend,
        ).loss,
        eager=_value,
        exact=_exact_value,
        # read values, old values, returns (4 bytes each) and mask (1); write the gradient (4)
        work=_of_tokens((13, 0), (13, 4)),
    ),
    Operation(
        name="aggregate",
        **_TOKENS,
        make=tokens,
        leaves=("logprobs",),
        ours=lambda inputs, backend: ops.aggregate(
            inputs["logprobs"], mask=inputs["mask"], backend=backend
        ),
        eager=_mean,
        exact=lambda inputs: reference.aggregate(
            inputs["logprobs"], "token-mean", mask=inputs["mask"]
        ),
        # read values (4 bytes) and mask (1); backward: read the mask, write the gradient
        work=_of_tokens((5, 0), (1, 4)),
    ),
    Operation(
        name="approx_kl",
        **_TOKENS,
        make=tokens,
        leaves=("logprobs",),
        ours=lambda inputs, backend: ops.approx_kl(
            inputs["logprobs"], inputs["ref_logprobs"], limit=10.0, backend=backend
        ),
        eager=_k3,
        exact=lambda inputs: reference.approx_kl(
            inputs["logprobs"], inputs["ref_logprobs"], "k3", limit=10.0
        ),
        # read both logprobs, write the value; backward: read them and a gradient, write one
        work=_of_tokens((8, 4), (12, 4)),
    ),
    Operation(
        name="kto_loss",
        **_TOKENS,
        make=tokens,
        leaves=("logprobs",),
        ours=lambda inputs, backend: ops.kto_loss(
            inputs["logprobs"], inputs["ref_logprobs"], inputs["desirable"], kl=0.5,
            mask=inputs["mask"], backend=backend,
        ).loss,
        eager=_kto,
        exact=lambda inputs: reference.kto_loss(
            inputs["logprobs"], inputs["ref_logprobs"], inputs["desirable"],
            torch.tensor(0.5, dtype=inputs["logprobs"].dtype, device=inputs["logprobs"].device),
            _count(inputs), mask=inputs["mask"],
        )[0],
        # read two logprobs (4 bytes each) and mask (1); write the gradient (4)
        work=_of_tokens((9, 0), (9, 4)),
    ),
    Operation(
        name="preference_loss",
        **_PAIRS,
        make=pairs,
        leaves=("chosen", "rejected"),
        ours=_ours_dpo,
        eager=_dpo,
        exact=_exact_dpo,
        work=_of_pairs(4),  # read four sums of a pair; write two gradients
    ),
    Operation(
        name="reward_model_loss",
        **_PAIRS,
        make=pairs,
        leaves=("chosen", "rejected"),
        ours=lambda inputs, backend: ops.reward_model_loss(
            inputs["chosen"], inputs["rejected"], backend=backend
        ).loss,
        eager=lambda inputs: -functional.logsigmoid(inputs["chosen"] - inputs["rejected"]).mean(),
        exact=lambda inputs: reference.reward_model_loss(
            inputs["chosen"], inputs["rejected"], _count(inputs, "chosen")
        )[0],
        work=_of_pairs(2),  # read two scores of a pair; write two gradients
    ),
    Operation(
        name="ranking_loss",
        sizes=("prompts", "group"),
        tiny={"prompts": 2, "group": 2},
        part=first_rows(4),
        make=_ranked,
        leaves=("scores",),
        ours=lambda inputs, backend: ops.ranking_loss(
            inputs["scores"].view(-1), inputs["ranks"].view(-1), _offsets(inputs), backend=backend
        ).loss,
        eager=_ranking,
        exact=lambda inputs: reference.ranking_loss(
            inputs["scores"].view(-1), inputs["ranks"].view(-1), _offsets(inputs),
            _count(inputs, "scores"),
        )[0],
        # read scores (4 bytes) and ranks (8), write the gradient (4); one exponential a pair
        work=lambda sizes, itemsize, mode: Work(
            read=12 * sizes["prompts"] * sizes["group"],
            written=0 if mode == "fwd" else 4 * sizes["prompts"] * sizes["group"],
            exps=sizes["prompts"] * sizes["group"] * (sizes["group"] - 1) // 2,
        ),
    ),
)  # fmt: skip
