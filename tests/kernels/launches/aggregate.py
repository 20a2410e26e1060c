"""Launches of the Triton kernels of aggregate, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.aggregate import (
    MIN_PARTS,
    AggregateArguments,
    AggregateBackwardArguments,
)
from warpo.kernels._arguments.denominator import DenominatorArguments

Launch = tuple[str, Callable[[], None]]


def aggregate(
    dtype: torch.dtype,
    packed: bool,
    masked: bool,
    aggregation: int,
    given: bool = False,
    rows: int = 4,
    steps: int = 100,
    number: float = -1.0,
    weighted: bool = False,
) -> None:
    from warpo.kernels import _triton

    values = torch.empty(steps if packed else (rows, steps), dtype=dtype)
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    mask, scalar = flags(values, masked), torch.empty(())
    weights = torch.empty(rows + 2 * MIN_PARTS)
    if weighted:
        mask = torch.empty(values.shape)
    forward = AggregateArguments(
        sequences=rows,
        steps=steps,
        cu_seqlens=cu_seqlens,
        values=values,
        mask=mask,
        aggregation=aggregation,
        denominator=DenominatorArguments(-1.0, scalar if given else None),
        weights=weights,
        result=scalar,
    )
    _triton.aggregate_forward(forward)
    backward = AggregateBackwardArguments(
        sequences=rows,
        steps=steps,
        cu_seqlens=cu_seqlens,
        mask=mask,
        weights=weights,
        grad=scalar,
        grad_values=torch.empty_like(values),
    )
    _triton.aggregate_backward(backward)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "packed mask", partial(aggregate, torch.float32, True, True, 0)
    if all_of_them:
        yield "mean mask", partial(aggregate, torch.bfloat16, False, True, 1)
        yield "parts", partial(aggregate, torch.bfloat16, False, True, 1, False, 2, 2000)
        yield "weights", partial(aggregate, torch.bfloat16, True, False, 1, weighted=True)
        yield "sum given", partial(aggregate, torch.bfloat16, False, False, 2, True)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37), (1, 4096)):
        yield partial(aggregate, torch.bfloat16, False, True, 1, False, rows, steps, 1 / rows)
