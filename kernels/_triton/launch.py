"""What all launchers share: kernels that compile once, and tensors as kernel arguments."""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor


def kernel(*aligned: str) -> Callable:
    """`triton.jit` that specialises no int64 parameter on its value, no pointer on its alignment.

    By default Triton compiles anew when an integer becomes 1 or divisible by 16, or a pointer
    divisible by 16. The pointers named here still do, since wide loads need it.
    """

    def decorate(function: Callable) -> triton.JITFunction:
        parameters = inspect.signature(function).parameters.values()
        return triton.jit(
            function,
            do_not_specialize=[p.name for p in parameters if p.annotation is tl.int64],
            do_not_specialize_on_alignment=[
                p.name for p in parameters if p.name.endswith("_ptr") and p.name not in aligned
            ],
        )

    return decorate


def strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Pointer and strides of a tensor `[rows, steps]`, or of a vector as one row; of an absent one,
    None and zeros.
    """
    if tensor is None:
        return None, 0, 0
    stride = tensor.stride()
    return (tensor, *stride) if len(stride) == 2 else (tensor, 0, stride[0])


def column(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """Pointer and stride of a tensor `[rows, 1]`; of an absent one, None and 0."""
    return (None, 0) if tensor is None else (tensor, tensor.stride(0))
