"""The structs of csrc/arguments/whiten.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class WhitenArguments(NamedTuple):
    rows: int
    columns: int
    x: Tensor
    mask: Tensor | None
    shift_mean: bool
    eps: float
    partials: Tensor | None
    stats: Tensor
    whitened: Tensor | None


class WhitenBackwardArguments(NamedTuple):
    forward: WhitenArguments
    grad_whitened: Tensor
    grad_x: Tensor
