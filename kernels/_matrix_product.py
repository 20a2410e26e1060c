"""Matrix products summed in float32: those of torch (BLAS), or our own on a CPU that has the
instructions: of float32 with AVX-512, of bfloat16 with AVX512_BF16.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._arguments.matrix_product import MatrixProductArguments

OWN_PRODUCTS = {torch.float32: "float32_product", torch.bfloat16: "bfloat16_product"}

_REDUCED = {
    torch.float16: "allow_fp16_reduced_precision_reduction",
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
}
_setting = threading.Lock()


def own_product(b: Tensor) -> Callable[[MatrixProductArguments], None] | None:
    """Ours of a matrix in float32 or the dtype of b with b: of processors that have it."""
    if not b.is_cpu or b.dtype not in OWN_PRODUCTS:
        return None
    return getattr(dispatch.load("cpu"), OWN_PRODUCTS[b.dtype], None)


def multiply(out: Tensor, a: Tensor, b: Tensor, addend: Tensor | None = None) -> None:
    """out = a @ b, or addend + a @ b, summed in float32 whatever the dtype of a.

    BLAS takes a and b of one dtype, out of that or of float32, and an addend of the dtype of out:
    out itself, else it is copied first.
    """
    product = own_product(b)
    if product is not None:
        rows, columns = out.shape
        product(
            MatrixProductArguments(
                rows=rows, columns=columns, depth=a.shape[1], a=a, b=b, addend=addend, out=out
            )
        )
    elif out.dtype == a.dtype:
        with sums_in_float32(out):
            if addend is not None:
                torch.addmm(addend, a, b, out=out)
            else:
                torch.mm(a, b, out=out)
    elif addend is not None:
        torch.addmm(addend, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@contextmanager
def _without(name: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    with _setting:
        before = (getattr(matmul, name), getattr(matmul, f"{name}_split_k"))
        setattr(matmul, name, False)
        try:
            yield
        finally:
            setattr(matmul, name, before)


def sums_in_float32(out: Tensor) -> AbstractContextManager[None]:
    """By default cuBLAS may add the parts of a long sum in the dtype of the result."""
    return _without(_REDUCED[out.dtype]) if out.is_cuda and out.dtype in _REDUCED else nullcontext()
