"""Losses of preferences and reward models."""

import torch
from torch import Tensor
from torch.nn import functional

from warpo.bench.operation import Inputs, Operation, Sizes, Work, first_rows
from warpo.bench.operations.losses import TOKENS, count_of, of_tokens, tokens
from warpo.kernels import ops, reference


def _kto(inputs: Inputs) -> Tensor:
    rewards = ((inputs["logprobs"] - inputs["ref_logprobs"]) * inputs["mask"]).sum(1)
    signs = inputs["desirable"].to(rewards.dtype) * 2 - 1
    return (1 - torch.sigmoid(0.1 * signs * (rewards - 0.5))).mean()


def _completions(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Logprobs of chosen and rejected completions under two policies, 9/10 of their tokens."""
    shape = (sizes["pairs"], sizes["steps"])
    found: Inputs = {}
    for name in ("chosen", "rejected"):
        ref = -torch.rand(shape, device=device)
        found[name] = ref + 0.1 * torch.randn(shape, device=device)
        found[f"ref_{name}"] = ref
        found[f"{name}_mask"] = torch.rand(shape, device=device) < 0.9
    return found


def _dpo(inputs: Inputs) -> Tensor:
    chosen, rejected = (
        ((inputs[name] - inputs[f"ref_{name}"]) * inputs[f"{name}_mask"]).sum(1)
        for name in ("chosen", "rejected")
    )
    return -functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def _ours_dpo(inputs: Inputs, backend: str) -> Tensor:
    return ops.preference_loss(
        inputs["chosen"],
        inputs["rejected"],
        inputs["ref_chosen"],
        inputs["ref_rejected"],
        loss="dpo",
        chosen_mask=inputs["chosen_mask"],
        rejected_mask=inputs["rejected_mask"],
        backend=backend,
    ).loss


def _exact_dpo(inputs: Inputs) -> Tensor:
    return reference.preference_loss(
        inputs["chosen"],
        inputs["rejected"],
        inputs["ref_chosen"],
        inputs["ref_rejected"],
        count_of(inputs["chosen"]),
        chosen_mask=inputs["chosen_mask"],
        rejected_mask=inputs["rejected_mask"],
    )[0]


def _pairs(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Scores of chosen and rejected completions."""
    return {name: torch.randn(sizes["pairs"], device=device) for name in ("chosen", "rejected")}


def _ranked(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Groups of completions with scores and ranks."""
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
        name="kto_loss",
        **TOKENS,
        make=tokens,
        leaves=("logprobs",),
        ours=lambda inputs, backend: (
            ops.kto_loss(
                inputs["logprobs"],
                inputs["ref_logprobs"],
                inputs["desirable"],
                kl=0.5,
                mask=inputs["mask"],
                backend=backend,
            ).loss
        ),
        eager=_kto,
        exact=lambda inputs: reference.kto_loss(
            inputs["logprobs"],
            inputs["ref_logprobs"],
            inputs["desirable"],
            torch.tensor(0.5, dtype=inputs["logprobs"].dtype, device=inputs["logprobs"].device),
            count_of(inputs["logprobs"]),
            mask=inputs["mask"],
        )[0],
        # read two logprobs (4 bytes each) and mask (1); write the gradient (4)
        work=of_tokens((9, 0), (9, 4)),
    ),
    Operation(
        name="preference_loss",
        sizes=("pairs", "steps"),
        tiny={"pairs": 2, "steps": 4},
        part=first_rows(4),
        make=_completions,
        leaves=("chosen", "rejected"),
        ours=_ours_dpo,
        eager=_dpo,
        exact=_exact_dpo,
        # of both completions read two logprobs (4 bytes each) and mask (1); write the gradient (4)
        work=lambda sizes, itemsize, mode: Work(
            read=18 * sizes["pairs"] * sizes["steps"],
            written=0 if mode == "fwd" else 8 * sizes["pairs"] * sizes["steps"],
        ),
    ),
    Operation(
        name="reward_model_loss",
        sizes=("pairs",),
        tiny={"pairs": 2},
        part=first_rows(64),
        make=_pairs,
        leaves=("chosen", "rejected"),
        ours=lambda inputs, backend: (
            ops.reward_model_loss(inputs["chosen"], inputs["rejected"], backend=backend).loss
        ),
        eager=lambda inputs: -functional.logsigmoid(inputs["chosen"] - inputs["rejected"]).mean(),
        exact=lambda inputs: reference.reward_model_loss(
            inputs["chosen"], inputs["rejected"], count_of(inputs["chosen"])
        )[0],
        # read two scores of a pair, write two gradients (4 bytes each); two exponentials
        work=lambda sizes, itemsize, mode: Work(
            read=8 * sizes["pairs"],
            written=0 if mode == "fwd" else 8 * sizes["pairs"],
            exps=2 * sizes["pairs"],
        ),
    ),
    Operation(
        name="ranking_loss",
        sizes=("prompts", "group"),
        tiny={"prompts": 2, "group": 2},
        part=first_rows(4),
        make=_ranked,
        leaves=("scores",),
        ours=lambda inputs, backend: (
            ops.ranking_loss(
                inputs["scores"].view(-1),
                inputs["ranks"].view(-1),
                _offsets(inputs),
                backend=backend,
            ).loss
        ),
        eager=_ranking,
        exact=lambda inputs: reference.ranking_loss(
            inputs["scores"].view(-1),
            inputs["ranks"].view(-1),
            _offsets(inputs),
            count_of(inputs["scores"]),
        )[0],
        # read scores (4 bytes) and ranks (8), write the gradient (4); one exponential per pair
        work=lambda sizes, itemsize, mode: Work(
            read=12 * sizes["prompts"] * sizes["group"],
            written=0 if mode == "fwd" else 4 * sizes["prompts"] * sizes["group"],
            exps=sizes["prompts"] * sizes["group"] * (sizes["group"] - 1) // 2,
        ),
    ),
)
