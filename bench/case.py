"""One operation at one size, and the providers that run it on the same tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

Call = Callable[[], object]


class Missing(RuntimeError):
    """A provider that is not installed, or does not do this; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size.

    Attributes:
        providers: name -> a function that makes the call to time, or raises `Missing`. Those of
            warpo have the names of its backends.
        error: backend name -> largest error against float64 on a part of the inputs, relative to
            the largest expected value.
        traffic: bytes that must be moved.
        bound: what limits it: "read" or "copy", the bandwidths that are measured in the same run.
        goals: what the backend "cpu" is held to: provider -> at least so many times as fast;
            "read" or "copy" -> at least this share of the bandwidth; "microseconds" -> at most;
            "bytes a token" -> peak memory beyond arguments and results, at most.
        tokens: by which peak memory is divided.
        repeat: how often the call runs the operation, so that the clock does not count.
    """

    name: str
    size: str
    providers: dict[str, Callable[[], Call]]
    error: Callable[[str], float]
    traffic: int
    bound: str = "copy"
    goals: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    repeat: int = 1


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None and expected is not None
    actual, expected = actual.detach().double(), expected.detach()
    scale = expected.abs().max().clamp(min=1e-30)
    return float(((actual - expected).abs().max() / scale).nan_to_num(torch.inf))


def compiled(function: Callable) -> Callable:
    """The peer of a user who adds one line to plain PyTorch."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def each_backend(device: str, make: Callable[[str], Call]) -> dict[str, Callable[[], Call]]:
    """The backends of a device as providers."""
    return {b: partial(make, b) for b in (("cpu",) if device == "cpu" else ("triton", "cuda"))}
