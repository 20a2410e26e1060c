"""The struct of csrc/arguments/denominator.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class DenominatorArguments(NamedTuple):
    number: float
    tensor: Tensor | None
