"""A fast look at lists of hundreds of tensors, which a check of each in Python would make slow."""

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from warpo.kernels import dispatch

# bits 1 << DType of csrc/view.h
FLOAT32, BFLOAT16, FLOAT16 = 1, 2, 4
ANY_FLOAT = FLOAT32 | BFLOAT16 | FLOAT16


def plain_dtypes(*lists: list[Tensor]) -> list[int]:
    """For each list, all of one length, the dtypes of its tensors, as bits, if each of them can be
    passed to a kernel as it is: of class Tensor or Parameter, with elements, all on one device; in
    the first list dense, or rows of dense columns that do not overlap; in the others dense, and of
    the shape of the tensor at its place there or flat.

    Zeros where one of them may not: the checks of a single tensor are to tell.
    """
    if is_dynamo_compiling():
        return [0] * len(lists)
    return dispatch.load("cpu").plain_dtypes(nn.Parameter, *lists)


def only(dtypes: int, allowed: int) -> bool:
    """Whether dtypes were found, and none but those allowed."""
    return dtypes != 0 and dtypes | allowed == allowed
