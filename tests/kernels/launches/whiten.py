"""Launches of the Triton kernels of whiten, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.whiten import WhitenArguments, WhitenBackwardArguments

Launch = tuple[str, Callable[[], None]]


def whiten(
    dtype: torch.dtype, masked: bool, shift_mean: bool, rows: int = 4, columns: int = 100
) -> None:
    from warpo.kernels import _triton

    x, result = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns)
    forward = WhitenArguments(
        rows=rows,
        columns=columns,
        x=x,
        mask=flags(x, masked),
        shift_mean=shift_mean,
        eps=1 / columns,
        partials=torch.empty(1024, 3),
        stats=torch.empty(3),
        whitened=result,
    )
    _triton.whiten_forward(forward)
    backward = WhitenBackwardArguments(forward=forward, grad_whitened=result, grad_x=result)
    _triton.whiten_backward(backward)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "float32 mask", partial(whiten, torch.float32, True, True)
    if all_of_them:
        yield "bf16", partial(whiten, torch.bfloat16, False, False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (16, 4096), (3, 70000)):
        yield partial(whiten, torch.float32, True, True, rows, columns)
