"""The structs of csrc/arguments/value_loss.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels._arguments.denominator import DenominatorArguments

# kMinValuePartials: rows of the workspace at least
MIN_VALUE_PARTIALS = 512


class ValueLossArguments(NamedTuple):
    sequences: int
    steps: int
    cu_seqlens: Tensor | None
    values: Tensor
    old_values: Tensor | None
    returns: Tensor
    mask: Tensor | None
    sequence_mean: bool
    clip_range: float
    huber_delta: float
    denominator: DenominatorArguments
    grad_values: Tensor | None
    partials: Tensor
    loss: Tensor
    metrics: Tensor
