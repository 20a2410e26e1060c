"""Launches of the Triton kernels of whiten, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def whiten(
    dtype: torch.dtype, masked: bool, shift_mean: bool, rows: int = 4, columns: int = 100
) -> None:
    from warpo.kernels import _triton

    x, result = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns)
    common = (rows, columns, x, flags(x, masked), shift_mean, 1 / columns, torch.empty(1024, 3))
    _triton.whiten_forward(*common, torch.empty(3), result)
    _triton.whiten_backward(*common, torch.empty(3), None, result, result)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "float32 mask", partial(whiten, torch.float32, True, True)
    if all_of_them:
        yield "bf16", partial(whiten, torch.bfloat16, False, False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (16, 4096), (3, 70000)):
        yield partial(whiten, torch.float32, True, True, rows, columns)
