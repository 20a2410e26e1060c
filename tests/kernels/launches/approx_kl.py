"""Launches of the Triton kernels of approx_kl, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def approx_kl(
    dtype: torch.dtype, estimator: int, k2_gradient: bool, masked: bool,
    rows: int = 4, columns: int = 100, limit: float = 10.0,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    token, result = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns)
    mask = flags(token, masked)
    _triton.approx_kl_forward(rows, columns, token, token, mask, estimator, limit, result)
    _triton.approx_kl_backward(
        rows, columns, token, token, result if k2_gradient else None, mask, estimator, k2_gradient,
        limit, result, token, token if masked else None,
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "k3 mask", partial(approx_kl, torch.float32, 3, False, True)
    if all_of_them:
        yield "k3 bf16", partial(approx_kl, torch.bfloat16, 3, False, True)
        yield "k1 plain", partial(approx_kl, torch.bfloat16, 1, False, False)
        yield "k2", partial(approx_kl, torch.bfloat16, 2, True, True)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (2, 128), (16, 37)):
        yield partial(approx_kl, torch.bfloat16, 3, False, True, rows, columns, 1 / rows)
