"""The plan and the products of a linear head as on a GPU, on any device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from warpo.kernels import _linear_head, _linear_logprobs_operator, _matrix_product


class Product(NamedTuple):
    """out = a @ b, or addend + a @ b."""

    out: Tensor
    a: Tensor
    b: Tensor
    addend: Tensor | None

    @property
    def size(self) -> tuple[int, int, int]:
        """Rows, columns and depth."""
        return (*self.out.shape, self.a.shape[1])

    def strides_in_bytes(self) -> list[int]:
        """From row to row, or from column to column."""
        return [max(x.stride()) * x.element_size() for x in (self.out, self.a, self.b)]


@contextmanager
def as_on_a_gpu() -> Iterator[list[Product]]:
    """Yields the products, which are held to what those of torch take and give on CUDA."""
    seen: list[Product] = []

    def multiply(out: Tensor, a: Tensor, b: Tensor, addend: Tensor | None = None) -> None:
        assert a.dtype == b.dtype and out.dtype in (a.dtype, torch.float32)
        # another addend would be copied first
        assert addend is None or addend is out
        for matrix in (out, a, b):
            assert 1 in matrix.stride() or 1 in matrix.shape
        seen.append(Product(out, a, b, addend))
        if not out.is_meta:
            result = a.float() @ b.float()
            out.copy_(result if addend is None else addend + result)

    with ExitStack() as stack:
        for module, name, replacement in (
            (_linear_head, "is_on_cpu", lambda hidden: False),
            (_linear_logprobs_operator, "is_on_cpu", lambda hidden: False),
            (_matrix_product, "own_product", lambda b: None),
            (_matrix_product, "multiply", multiply),
        ):
            stack.enter_context(patch.object(module, name, replacement))
        yield seen
