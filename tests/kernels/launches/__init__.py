"""Launches of every Triton kernel on CPU tensors for test_triton_compile, a module an operation.

A module has `configurations(all_of_them)`: label and launch of every configuration of its kernels,
or of the largest of each kind; and `variations()`: launches with other sizes, strides and scalars,
which must compile nothing that `configurations(True)` has not compiled.
"""

import torch
from torch import Tensor


def flags(like: Tensor, present: bool) -> Tensor | None:
    # preserves the strides of `like`
    return torch.empty_like(like, dtype=torch.bool) if present else None
