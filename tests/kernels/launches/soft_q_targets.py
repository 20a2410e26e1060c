"""Launches of the Triton kernel of soft_q_targets, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

Launch = tuple[str, Callable[[], None]]


def soft_q_targets(dtype: torch.dtype, count: int = 100, gamma: float = 0.99) -> None:
    from warpo.kernels import _triton

    given = torch.empty(count, dtype=dtype)
    ends = torch.empty(count, dtype=torch.bool)
    _triton.soft_q_targets(
        count, given, ends, given, given, given, torch.empty(()), gamma, torch.empty(count)
    )


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "float32", partial(soft_q_targets, torch.float32)
    if all_of_them:
        yield "bf16", partial(soft_q_targets, torch.bfloat16)


def variations() -> Iterator[Callable[[], None]]:
    for count in (1, 16, 4096):
        yield partial(soft_q_targets, torch.float32, count, 1 / count)
