"""A 64-bit fingerprint of the bits of a tensor: partial sums, and a launch that adds them up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import kernel

BLOCK = 4096
MAX_PROGRAMS = 1024
WARPS = 8

INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)
FACTOR_1 = tl.constexpr(0xBF58476D1CE4E5B9)
FACTOR_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def fingerprint_terms(index, bits):
    """The terms of `csrc/math/fingerprint.h` for int64 positions and uint32 bits."""
    z = (index + 1).to(tl.uint64) * INCREMENT + bits.to(tl.uint64)
    z = (z ^ (z >> 30)) * FACTOR_1
    z = (z ^ (z >> 27)) * FACTOR_2
    return (z ^ (z >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def unsigned(bits):
    """int16 or int32 as uint32, without a sign that spreads."""
    if bits.dtype == tl.int16:
        result = bits.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        result = bits.to(tl.uint32, bitcast=True)
    return result


def as_bits(tensor: Tensor) -> Tensor:
    """The bits of the elements, as signed integers: Triton's interpreter knows no bfloat16."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@kernel()
def _fingerprint_kernel(
    bits_ptr, bits_stride: tl.int64, rows: tl.int64, columns: tl.int64, partials_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    per_row = (columns + BLOCK - 1) // BLOCK
    total = tl.zeros([BLOCK], tl.int64)
    for tile in range(program, rows * per_row, tl.num_programs(0)):
        row = tile // per_row
        column = (tile - row * per_row) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        bits = tl.load(bits_ptr + row * bits_stride + column, mask=inside, other=0)
        terms = fingerprint_terms(row * columns + column, unsigned(bits))
        total += tl.where(inside, terms, 0)
    tl.store(partials_ptr + program, tl.sum(total))


@kernel()
def _fingerprint_sum_kernel(
    partials_ptr, programs: tl.int64, fingerprint_ptr, MAX_PROGRAMS: tl.constexpr
):  # fmt: skip
    part = tl.arange(0, MAX_PROGRAMS)
    tl.store(fingerprint_ptr, tl.sum(tl.load(partials_ptr + part, mask=part < programs, other=0)))


def fingerprint(
    rows: int, columns: int, tensor: Tensor, partials: Tensor, fingerprint: Tensor
) -> None:
    """The fields of `Fingerprint`."""
    programs = min(MAX_PROGRAMS, rows * triton.cdiv(columns, BLOCK))
    bits = as_bits(tensor)
    with torch.cuda.device_of(tensor):
        _fingerprint_kernel[(programs,)](
            bits, bits.stride(0), rows, columns, partials, BLOCK=BLOCK, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        _fingerprint_sum_kernel[(1,)](
            partials, programs, fingerprint, MAX_PROGRAMS=MAX_PROGRAMS, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
