"""The structs of csrc/arguments/aggregate.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels._arguments.denominator import DenominatorArguments

# kMinAggregateParts: rows of the workspace at least
MIN_PARTS = 512


class AggregateArguments(NamedTuple):
    sequences: int
    steps: int
    cu_seqlens: Tensor | None
    values: Tensor
    mask: Tensor | None
    aggregation: int
    denominator: DenominatorArguments
    weights: Tensor
    result: Tensor


class AggregateBackwardArguments(NamedTuple):
    sequences: int
    steps: int
    cu_seqlens: Tensor | None
    mask: Tensor | None
    weights: Tensor
    grad: Tensor
    grad_values: Tensor
