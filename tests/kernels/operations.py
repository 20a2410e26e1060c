"""Every operation with arguments for one small call, for the matrix of test_contract."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels.backends import DEVICE
from warpo.kernels import ops


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A public function of `ops` and what the promises mean for it.

    Attributes:
        tensors: new arguments by name, float32 where they are numbers.
        floats: those that may also be bfloat16 or float16.
        differentiable: those that a gradient reaches.
        outputs: so many of the results, from the first on, have a gradient.
        masked: those that are not read where `mask` is 0.
        batched: those whose first dimension is that of sequences or tokens, each computed alone.
        vocabulary: the one whose last dimension is the vocabulary.
        wrong: an option and a value outside its set.
        not_promised: number of a promise -> why it has no meaning here.
        kernels: the file of its tests and launches.
    """

    name: str
    kernels: str
    tensors: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    floats: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    outputs: int | None = None
    masked: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    vocabulary: str | None = None
    wrong: tuple[str, Any] = ("backend", "fastest")
    not_promised: dict[int, str] = field(default_factory=dict)

    def __call__(self, tensors: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
        """All results, in order."""
        arguments = {**tensors, **self.options, "backend": backend, **options}
        results = getattr(ops, self.name)(**arguments)
        return [results] if isinstance(results, Tensor) else list(results)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _numbers(*shape: int, scale: float = 1.0) -> Tensor:
    # of few bits, so that they are the same numbers in every dtype
    return (scale * torch.randn(shape, generator=_generator()) * 16).round().div(16).to(DEVICE)


def _mask(*shape: int) -> Tensor:
    mask = torch.rand(shape, generator=_generator()) < 0.7
    mask[..., 0] = True
    return mask.to(DEVICE)


def _targets(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator()).to(DEVICE)


B, T, V = 3, 9, 37


def _logits() -> dict[str, Tensor]:
    return {"logits": _numbers(B, T, V, scale=3), "targets": _targets(V, B, T), "mask": _mask(B, T)}


def _token_level() -> dict[str, Tensor]:
    return {"rewards": _numbers(B, T), "values": _numbers(B, T).flip(0), "mask": _mask(B, T)}


def _policy() -> dict[str, Tensor]:
    old = -_numbers(B, T).abs() - 0.5
    return {
        "logprobs": old + _numbers(B, T, scale=0.25).flip(1),
        "old_logprobs": old,
        "ref_logprobs": old.flip(0),
        "advantages": _numbers(B, T).flip(1),
        "mask": _mask(B, T),
    }


_LOGPROBS: dict[str, Any] = {
    "kernels": "logprobs",
    "tensors": _logits,
    "floats": ("logits",),
    "differentiable": ("logits",),
    "masked": ("logits",),
    "batched": ("logits", "targets", "mask"),
    "vocabulary": "logits",
}
_NO_MASK = "it takes no mask"

OPERATIONS = [
    Operation(name="logprobs", **_LOGPROBS),
    Operation(name="logprobs_and_entropy", **_LOGPROBS),
    Operation(
        name="gae",
        kernels="gae",
        tensors=_token_level,
        options={"gamma": 0.9, "gae_lambda": 0.8},
        floats=("rewards", "values"),
        differentiable=("rewards", "values"),
        masked=("rewards", "values"),
        batched=("rewards", "values", "mask"),
        wrong=("mask_mode", "skip"),
    ),
    Operation(
        name="policy_loss",
        kernels="policy_loss",
        tensors=_policy,
        options={"objective": "grpo", "denominator": 3.0},
        floats=("logprobs", "old_logprobs", "ref_logprobs", "advantages"),
        differentiable=("logprobs",),
        masked=("logprobs", "old_logprobs", "ref_logprobs", "advantages"),
        wrong=("objective", "grppo"),
    ),
    Operation(
        name="group_advantages",
        kernels="group_advantages",
        tensors=lambda: {"rewards": _numbers(12)},
        options={"group_size": 4},
        floats=("rewards",),
        differentiable=("rewards",),
        outputs=1,
        wrong=("std", "robust"),
        not_promised={4: _NO_MASK},
    ),
]

# public functions that compute nothing on tensors of tokens
HELPERS = ("policy_metrics", "sum_metrics", "get_objective")
