"""A 64-bit fingerprint of the bits of a tensor: two tensors that should be equal, compared by eight
bytes.

    fingerprint = sum over j of mix(0x9e3779b97f4a7c15 (j + 1) + word_j)  modulo 2^64

word_j holds 64 bits of the elements in row-major order, 2 of float32 or 4 of 16 bits: the first in
the lowest bits, zeros after the last. j is its position, so that an exchange is seen; strides do
not matter. Addition of integers is associative: any order gives the same number, on every device. A
change of one word always changes it, other changes with all but 2^-64 of the chance. It guards
against mistakes, not against an adversary. -0 and 0 differ, and so do two NaN with different bits.

Source: mix is that of SplitMix64, Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", https://doi.org/10.1145/2660193.2660195 figure 16.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.fingerprint import FingerprintArguments
from warpo.kernels._checks import FLOATS, as_rows, check_tensor
from warpo.kernels._plain import ANY_FLOAT, only, plain_dtypes
from warpo.kernels._registration import Operator


class FingerprintInputs(NamedTuple):
    tensors: list[Tensor]
    backend: str


def fingerprint(tensor: Tensor, *, backend: str | None = None) -> Tensor:
    """The fingerprint of a tensor, which `adamw_publish` gives for what it has published.

    Args:
        tensor: float32 | bfloat16 | float16, of any shape; dense, or rows of any stride whose last
            dimension is dense. Only read.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        () int64, on the device: the 64 bits as a signed number. 0 for an empty tensor.

    Raises:
        ValueError: a dtype, device or layout is not as above.

    Memory beyond arguments and results: with Triton 40 bytes, and no capture into a CUDA graph;
    else none.
    """
    check_tensor("tensor", tensor, FLOATS)
    rows = rows_of("tensor", tensor.detach())
    name = dispatch.choose(tensor, backend)
    if name == "reference":
        return reference.fingerprint(rows)
    return _operator(FingerprintInputs(tensors=[rows], backend=name)).squeeze(0)


def fingerprint_foreach(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The fingerprints of many tensors: those of `fingerprint`, in a few launches for all of them.

    Args:
        tensors: at least one, each as `fingerprint` takes it, all on one device.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (tensors,) int64, on the device.

    Raises:
        ValueError: a dtype, device or layout is not as above; the tensor is named.

    Memory beyond arguments and results: with Triton 40 bytes per tensor, and no capture into a CUDA
    graph; else none.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("tensors is empty: pass at least one")
    name = dispatch.choose(tensors[0], backend)
    if not only(plain_dtypes(tensors)[0], ANY_FLOAT):
        for i, tensor in enumerate(tensors):
            check_tensor(f"tensors[{i}]", tensor, FLOATS, like=tensors[0])
        tensors = [rows_of(f"tensors[{i}]", x.detach()) for i, x in enumerate(tensors)]
    if name == "reference":
        return torch.stack([reference.fingerprint(x) for x in tensors])
    return _operator(FingerprintInputs(tensors=tensors, backend=name))


def rows_of(name: str, tensor: Tensor) -> Tensor:
    """A view [rows, columns] with dense columns: one row if the tensor is dense.

    Raises:
        ValueError: the strides do not allow it.
    """
    if tensor.is_contiguous():
        return tensor.view(1, -1)
    rows = as_rows(name, tensor)
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        raise ValueError(
            f"{name} must be dense in its last dimension, got shape {tuple(tensor.shape)} and "
            f"strides {tensor.stride()}: pass a view whose last stride is 1"
        )
    return rows


def _forward(inputs: FingerprintInputs) -> Tensor:
    fingerprints = inputs.tensors[0].new_zeros(len(inputs.tensors), dtype=torch.int64)
    arguments = FingerprintArguments(tensors=inputs.tensors, fingerprints=fingerprints)
    dispatch.load(inputs.backend).fingerprint(arguments)
    return fingerprints


def _allocate(inputs: FingerprintInputs) -> Tensor:
    return inputs.tensors[0].new_empty(len(inputs.tensors), dtype=torch.int64)


_operator = Operator("fingerprint", _forward, _allocate)
