"""Launches of the Triton kernels of fingerprint, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.fingerprint import FingerprintArguments

Launch = tuple[str, Callable[[], None]]


def fingerprint(dtype: torch.dtype, rows: int = 3, columns: int = 100) -> None:
    from warpo.kernels import _triton

    tensors = [torch.empty(rows, columns, dtype=dtype), torch.empty(rows, 7, dtype=dtype)]
    sums = torch.zeros(2, dtype=torch.int64)
    arguments = FingerprintArguments(tensors=tensors, fingerprints=sums)
    _triton.fingerprint(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for dtype in (torch.bfloat16, torch.float32)[: 1 + all_of_them]:
        yield str(dtype).removeprefix("torch."), partial(fingerprint, dtype)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (1, 4096), (16, 37)):
        yield partial(fingerprint, torch.bfloat16, rows, columns)
