"""64-bit fingerprints of the bits of tensors: each program adds its part, in any order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.fingerprint import FingerprintArguments
from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.tables import send

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


@triton.jit
def pointer(address, ELEMENT_BYTES: tl.constexpr):
    """To the bits of elements, as signed integers: Triton's interpreter knows no bfloat16."""
    if ELEMENT_BYTES == 2:
        result = address.to(tl.pointer_type(tl.int16))
    else:
        result = address.to(tl.pointer_type(tl.int32))
    return result


def shape_of(tensor: Tensor) -> tuple[int, int, int]:
    """Stride of the rows, columns, and elements in all; a dense tensor is one row."""
    if tensor.is_contiguous():
        return 0, tensor.numel(), tensor.numel()
    return tensor.stride(0), tensor.shape[1], tensor.numel()


@kernel()
def _fingerprint_kernel(
    table_ptr, fingerprints_ptr, ELEMENT_BYTES: tl.constexpr, BLOCK: tl.constexpr
):
    tensor = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    size = tl.load(table_ptr + 5 * tensor + 3)
    columns = tl.load(table_ptr + 5 * tensor + 2)
    stride = tl.load(table_ptr + 5 * tensor + 1)
    bits_ptr = pointer(tl.load(table_ptr + 5 * tensor), ELEMENT_BYTES)
    PER_WORD: tl.constexpr = 8 // ELEMENT_BYTES
    total = tl.zeros([BLOCK // PER_WORD], tl.int64)
    for tile in range(program, (size + BLOCK - 1) // BLOCK, tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        pointers = bits_ptr + offset_of(at, columns, size, stride)
        bits = unsigned(tl.load(pointers, mask=at < size, other=0))
        total += fingerprint_terms(tile, size, bits, PER_WORD, BLOCK)
    if program * BLOCK < size:
        which = tl.load(table_ptr + 5 * tensor + 4)
        tl.atomic_add(fingerprints_ptr + which, tl.sum(total))


def fingerprint(a: FingerprintArguments) -> None:
    for element_bytes in (2, 4):
        rows = [
            (x.data_ptr(), *shape_of(x), i)
            for i, x in enumerate(a.tensors)
            if x.element_size() == element_bytes and x.numel()
        ]
        if not rows:
            continue
        table = send(rows, torch.int64, "fingerprint", a.fingerprints)
        programs = min(MAX_PROGRAMS, triton.cdiv(max(row[3] for row in rows), BLOCK))
        with torch.cuda.device_of(table):
            _fingerprint_kernel[(programs, len(rows))](
                table,
                a.fingerprints,
                ELEMENT_BYTES=element_bytes,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
