"""Launches of the Triton kernels of value_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.value_loss import ValueLossArguments
from warpo.kernels._value_loss import VALUE_METRICS

Launch = tuple[str, Callable[[], None]]


def value_loss(
    dtype: torch.dtype,
    packed: bool,
    clip: bool,
    mean: bool,
    rows: int = 4,
    steps: int = 100,
    clip_range: float = 0.2,
) -> None:
    from warpo.kernels import _triton

    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    scalar = torch.empty(())
    arguments = ValueLossArguments(
        sequences=rows,
        steps=steps,
        cu_seqlens=cu_seqlens,
        values=token,
        old_values=token if clip else None,
        returns=token,
        mask=flags(token, mean),
        sequence_mean=mean,
        clip_range=clip_range,
        huber_delta=2 * clip_range,
        denominator=DenominatorArguments(0.0, scalar),
        grad_values=torch.empty(rows, steps),
        partials=torch.empty(rows, len(VALUE_METRICS)),
        loss=scalar,
        metrics=torch.empty(len(VALUE_METRICS)),
    )
    _triton.value_loss(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "packed clip", partial(value_loss, torch.float32, True, True, False)
    if all_of_them:
        yield "mean mask clip", partial(value_loss, torch.bfloat16, False, True, True)
        yield "plain", partial(value_loss, torch.bfloat16, False, False, False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        yield partial(value_loss, torch.bfloat16, False, True, True, rows, steps, 1 / rows)
