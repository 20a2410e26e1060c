"""Launches of the Triton kernel of soft_q_targets, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.soft_q_targets import SoftQTargetsArguments

Launch = tuple[str, Callable[[], None]]


def soft_q_targets(dtype: torch.dtype, count: int = 100, gamma: float = 0.99) -> None:
    from warpo.kernels import _triton

    given = torch.empty(count, dtype=dtype)
    ends = torch.empty(count, dtype=torch.bool)
    arguments = SoftQTargetsArguments(
        transitions=count,
        rewards=given,
        terminated=ends,
        next_q1=given,
        next_q2=given,
        next_logprobs=given,
        alpha=torch.empty(()),
        gamma=gamma,
        targets=torch.empty(count),
    )
    _triton.soft_q_targets(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "float32", partial(soft_q_targets, torch.float32)
    if all_of_them:
        yield "bf16", partial(soft_q_targets, torch.bfloat16)


def variations() -> Iterator[Callable[[], None]]:
    for count in (1, 16, 4096):
        yield partial(soft_q_targets, torch.float32, count, 1 / count)
