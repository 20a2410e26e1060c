"""A 64-bit fingerprint of the bits of a tensor: partial sums, and a launch that adds them up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.fingerprint import FingerprintArguments
from warpo.kernels._triton.launch import kernel

BLOCK = 4096
MAX_PROGRAMS = 1024
WARPS = 8

INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)
FACTOR_1 = tl.constexpr(0xBF58476D1CE4E5B9)
FACTOR_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def splitmix64(z):
    """The mixer of `csrc/math/fingerprint.h`, of uint64."""
    z = (z ^ (z >> 30)) * FACTOR_1
    z = (z ^ (z >> 27)) * FACTOR_2
    return z ^ (z >> 31)


@triton.jit
def fingerprint_terms(tile, size, bits, PER_WORD: tl.constexpr, BLOCK: tl.constexpr):
    """The terms, as int64, of the words of a tile of BLOCK elements whose bits are uint32, and 0
    from element `size` on.
    """
    shift: tl.constexpr = 64 // PER_WORD
    parts = tl.reshape(bits.to(tl.int64), [BLOCK // PER_WORD, PER_WORD])
    word = tl.sum(parts << (shift * tl.arange(0, PER_WORD)[None, :]).to(tl.int64), axis=1)
    index = tile * (BLOCK // PER_WORD) + tl.arange(0, BLOCK // PER_WORD)
    z = (index + 1).to(tl.uint64) * INCREMENT + word.to(tl.uint64, bitcast=True)
    terms = splitmix64(z).to(tl.int64, bitcast=True)
    return tl.where(index * PER_WORD < size, terms, 0)


@triton.jit
def offset_of(at, columns, size, stride):
    """Of elements in row-major order, in rows whose columns are dense. A division of int64 would
    take longer than the rest.
    """
    offset = at
    if columns < size:
        row = at // columns
        offset = row * stride + (at - row * columns)
    return offset


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
    bits_ptr,
    bits_stride: tl.int64,
    columns: tl.int64,
    size: tl.int64,
    partials_ptr,
    PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK // PER_WORD], tl.int64)
    for tile in range(program, (size + BLOCK - 1) // BLOCK, tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        pointers = bits_ptr + offset_of(at, columns, size, bits_stride)
        bits = unsigned(tl.load(pointers, mask=at < size, other=0))
        total += fingerprint_terms(tile, size, bits, PER_WORD, BLOCK)
    tl.store(partials_ptr + program, tl.sum(total))


@kernel()
def _fingerprint_sum_kernel(
    partials_ptr, programs: tl.int64, fingerprint_ptr, MAX_PROGRAMS: tl.constexpr
):
    part = tl.arange(0, MAX_PROGRAMS)
    tl.store(fingerprint_ptr, tl.sum(tl.load(partials_ptr + part, mask=part < programs, other=0)))


def fingerprint(a: FingerprintArguments) -> None:
    size = a.rows * a.columns
    programs = min(MAX_PROGRAMS, triton.cdiv(size, BLOCK))
    bits = as_bits(a.tensor)
    with torch.cuda.device_of(bits):
        _fingerprint_kernel[(programs,)](
            bits,
            bits.stride(0),
            a.columns,
            size,
            a.partials,
            PER_WORD=8 // bits.element_size(),
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        _fingerprint_sum_kernel[(1,)](
            a.partials,
            programs,
            a.fingerprint,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4,
            enable_fp_fusion=True,
        )
