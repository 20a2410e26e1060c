"""Launches of the Triton kernels of approx_kl, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.approx_kl import ApproxKlArguments, ApproxKlBackwardArguments

Launch = tuple[str, Callable[[], None]]


def approx_kl(
    dtype: torch.dtype,
    estimator: int,
    k2_gradient: bool,
    masked: bool,
    rows: int = 4,
    columns: int = 100,
    limit: float = 10.0,
) -> None:
    from warpo.kernels import _triton

    token, result = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns)
    mask = flags(token, masked)
    forward = ApproxKlArguments(
        rows=rows,
        columns=columns,
        logprobs=token,
        ref_logprobs=token,
        mask=mask,
        estimator=estimator,
        limit=limit,
        kl=result,
    )
    _triton.approx_kl_forward(forward)
    backward = ApproxKlBackwardArguments(
        rows=rows,
        columns=columns,
        logprobs=token,
        ref_logprobs=token,
        weight=result if k2_gradient else None,
        mask=mask,
        estimator=estimator,
        straight_through=k2_gradient,
        limit=limit,
        grad_kl=result,
        grad_logprobs=token,
        grad_ref=token if masked else None,
    )
    _triton.approx_kl_backward(backward)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "k3 mask", partial(approx_kl, torch.float32, 3, False, True)
    if all_of_them:
        yield "k3 bf16", partial(approx_kl, torch.bfloat16, 3, False, True)
        yield "reverse k3", partial(approx_kl, torch.float32, 4, False, True)
        yield "k1 plain", partial(approx_kl, torch.bfloat16, 1, False, False)
        yield "k2", partial(approx_kl, torch.bfloat16, 2, True, True)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (2, 128), (16, 37)):
        yield partial(approx_kl, torch.bfloat16, 3, False, True, rows, columns, 1 / rows)
