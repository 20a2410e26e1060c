"""Losses of policies and critics, and what they are made of."""

from typing import Any

import torch
from torch import Tensor

from warpo.bench import peers
from warpo.bench.operation import Inputs, Operation, Provider, Sizes, Work, first_rows
from warpo.kernels import ops, reference

TOKENS: dict[str, Any] = {
    "sizes": ("sequences", "steps"),
    "tiny": {"sequences": 2, "steps": 4},
    "part": first_rows(4),
    "mask": "mask",
}


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


def of_tokens(fwd: tuple[int, int], bwd: tuple[int, int]) -> Any:
    """Bytes of a token that are read and written, forward and in the backward pass after it."""

    def work(sizes: Sizes, itemsize: int, mode: str) -> Work:
        count = sizes["sequences"] * sizes["steps"]
        read, written = fwd if mode == "fwd" else bwd
        if mode == "fwd+bwd":
            read, written = max(fwd[0], bwd[0]), max(fwd[1], bwd[1])
        return Work(read=count * read, written=count * written)

    return work


def count_of(rows: Tensor) -> Tensor:
    """The number of rows, as the definitions take a denominator."""
    return torch.tensor(float(len(rows)), dtype=rows.dtype, device=rows.device)


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
        logp,
        inputs["old_logprobs"],
        inputs["advantages"][:, None].expand_as(logp),
        ops.OBJECTIVES["grpo"],
        count_of(logp),
        mask=inputs["mask"],
        ref=inputs["ref_logprobs"],
    )[0]


def _trl() -> Any:
    function = peers.trl_grpo_loss(beta=0.04)
    return lambda inputs: function(
        inputs["logprobs"],
        inputs["old_logprobs"],
        inputs["ref_logprobs"],
        inputs["advantages"],
        inputs["mask"].long(),
    )


def _value(inputs: Inputs) -> Tensor:
    values, old, returns, mask = (inputs[n] for n in ("values", "old_values", "returns", "mask"))
    cut = old + (values - old).clamp(-0.2, 0.2)
    loss = torch.max((values - returns) ** 2, (cut - returns) ** 2)
    return 0.5 * (loss * mask).sum() / mask.sum()


def _exact_value(inputs: Inputs) -> Tensor:
    count = inputs["mask"].sum().to(inputs["values"].dtype)
    return reference.value_loss(
        inputs["values"],
        inputs["old_values"],
        inputs["returns"],
        count,
        mask=inputs["mask"],
        clip_range=0.2,
    )[0]


def _mean(inputs: Inputs) -> Tensor:
    mask = inputs["mask"]
    return torch.where(mask, inputs["logprobs"], 0.0).sum() / mask.sum()


def _k3(inputs: Inputs) -> Tensor:
    difference = inputs["ref_logprobs"] - inputs["logprobs"]
    return (difference.exp() - difference - 1).clamp(-10, 10)


OPERATIONS = (
    Operation(
        name="policy_loss",
        **TOKENS,
        make=tokens,
        leaves=("logprobs",),
        ours=lambda inputs, backend: (
            ops.policy_loss(
                inputs["logprobs"],
                inputs["old_logprobs"],
                inputs["advantages"],
                "grpo",
                mask=inputs["mask"],
                ref_logprobs=inputs["ref_logprobs"],
                backend=backend,
            ).loss
        ),
        eager=grpo,
        exact=_exact_grpo,
        others={"trl": Provider(load=_trl)},
        # read three logprobs (4 bytes each) and mask (1); backward: scale the gradient (4 and 4)
        work=of_tokens((13, 0), (13, 4)),
    ),
    Operation(
        name="value_loss",
        **TOKENS,
        make=tokens,
        leaves=("values",),
        ours=lambda inputs, backend: (
            ops.value_loss(
                inputs["values"],
                inputs["old_values"],
                inputs["returns"],
                mask=inputs["mask"],
                clip_range=0.2,
                backend=backend,
            ).loss
        ),
        eager=_value,
        exact=_exact_value,
        # read values, old values, returns (4 bytes each) and mask (1); write the gradient (4)
        work=of_tokens((13, 0), (13, 4)),
    ),
    Operation(
        name="aggregate",
        **TOKENS,
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
        work=of_tokens((5, 0), (1, 4)),
    ),
    Operation(
        name="approx_kl",
        **TOKENS,
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
        work=of_tokens((8, 4), (12, 4)),
    ),
)
