"""The structs of csrc/arguments/matrix_product.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class MatrixProductArguments(NamedTuple):
    rows: int
    columns: int
    depth: int
    a: Tensor
    b: Tensor
    addend: Tensor | None
    out: Tensor
