"""Launches of the Triton kernels of squashed_gaussian, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.squashed_gaussian import (
    SquashedGaussianArguments,
    SquashedGaussianBackwardArguments,
)

Launch = tuple[str, Callable[[], None]]


def squashed_gaussian(
    dtype: torch.dtype,
    of_actions: bool,
    of_logprobs: bool,
    rows: int = 256,
    columns: int = 6,
    low: float = -20.0,
) -> None:
    from warpo.kernels import _triton

    given = torch.empty(rows, columns, dtype=dtype)
    actions, logprobs = torch.empty(rows, columns), torch.empty(rows)
    forward = SquashedGaussianArguments(
        rows=rows,
        columns=columns,
        mean=given,
        log_std=given,
        noise=given,
        log_std_min=low,
        log_std_max=low / -10,
        actions=actions,
        logprobs=logprobs,
    )
    _triton.squashed_gaussian_forward(forward)
    backward = SquashedGaussianBackwardArguments(
        forward=forward._replace(actions=None, logprobs=None),
        grad_actions=actions if of_actions else None,
        grad_logprobs=logprobs if of_logprobs else None,
        grad_mean=actions,
        grad_log_std=actions,
    )
    _triton.squashed_gaussian_backward(backward)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "float32", partial(squashed_gaussian, torch.float32, True, True)
    if all_of_them:
        yield "bf16 actions", partial(squashed_gaussian, torch.bfloat16, True, False)
        yield "bf16 logprobs", partial(squashed_gaussian, torch.bfloat16, False, True)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (16, 16), (3, 7000)):
        yield partial(squashed_gaussian, torch.float32, True, True, rows, columns, -rows)
