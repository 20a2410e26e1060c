"""AdamW rounded into the published weights in one pass; a second launch adds up the counts.

The published weights pass as bits: they are what the fingerprint reads, and Triton's interpreter
would truncate where a GPU rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.fingerprint import as_bits, fingerprint_terms, unsigned
from warpo.kernels._triton.launch import kernel

BLOCK = 1024
MAX_PROGRAMS = 1024
WARPS = 8

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def _round_to_bits(value, DTYPE: tl.constexpr):
    """To the nearest, ties to even; the bits as uint32."""
    bits = value.to(tl.uint32, bitcast=True)
    if DTYPE == BFLOAT16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, rounded, 0x7FC0)
    elif DTYPE == FLOAT16:
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits


@triton.jit
def _value_of(bits, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE == FLOAT16:
        value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value


@kernel()
def _adamw_publish_kernel(
    grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, published_ptr, published_stride: tl.int64,
    rows: tl.int64, columns: tl.int64, decay: tl.float32, grad_weight: tl.float32,
    beta2: tl.float32, square_weight: tl.float32, step_size: tl.float32, root_scale: tl.float32,
    eps: tl.float32, grad_scale: tl.float32, grad_scale_factor_ptr,
    partial_counts_ptr, partial_updates_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if grad_scale_factor_ptr is not None:
        grad_scale *= tl.load(grad_scale_factor_ptr)
    per_row = (columns + BLOCK - 1) // BLOCK
    fingerprint = tl.zeros([BLOCK], tl.int64)
    changed = tl.zeros([BLOCK], tl.int64)
    master_update = tl.zeros([BLOCK], tl.float32)
    published_update = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, rows * per_row, tl.num_programs(0)):
        row = tile // per_row
        column = (tile - row * per_row) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        at = row * columns + column
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32) * grad_scale
        exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0)
        pointers = published_ptr + row * published_stride + column
        before = unsigned(tl.load(pointers, mask=inside, other=0))
        if master_ptr is None:
            old = _value_of(before, DTYPE)
        else:
            old = tl.load(master_ptr + at, mask=inside, other=0)

        exp_avg += grad_weight * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + square_weight * (grad * grad)
        root = tl.sqrt_rn(exp_avg_sq) * root_scale + eps
        new = decay * old - step_size * tl.div_rn(exp_avg, root)
        bits = _round_to_bits(new, DTYPE)

        if master_ptr is not None:
            tl.store(master_ptr + at, new, mask=inside)
        tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
        if DTYPE == 0:
            tl.store(pointers, bits.to(tl.int32, bitcast=True), mask=inside)
        else:
            tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        fingerprint += tl.where(inside, fingerprint_terms(at, bits), 0)
        changed += (inside & (bits != before)).to(tl.int64)
        master_update += tl.where(inside, tl.abs(new - old), 0.0)
        difference = _value_of(bits, DTYPE) - _value_of(before, DTYPE)
        published_update += tl.where(inside, tl.abs(difference), 0.0)
    tl.store(partial_counts_ptr + 2 * program, tl.sum(fingerprint))
    tl.store(partial_counts_ptr + 2 * program + 1, tl.sum(changed))
    tl.store(partial_updates_ptr + 2 * program, tl.sum(master_update))
    tl.store(partial_updates_ptr + 2 * program + 1, tl.sum(published_update))


@kernel()
def _adamw_sum_kernel(
    partial_counts_ptr, partial_updates_ptr, programs: tl.int64, counts_ptr, updates_ptr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    part = tl.arange(0, MAX_PROGRAMS)
    exists = part < programs
    for which in tl.static_range(2):
        counts = tl.load(partial_counts_ptr + 2 * part + which, mask=exists, other=0)
        updates = tl.load(partial_updates_ptr + 2 * part + which, mask=exists, other=0.0)
        tl.store(counts_ptr + which, tl.sum(counts))
        tl.store(updates_ptr + which, tl.sum(updates))


def adamw_publish(
    rows: int,
    columns: int,
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    published: Tensor,
    decay: float,
    grad_weight: float,
    beta2: float,
    square_weight: float,
    step_size: float,
    root_scale: float,
    eps: float,
    grad_scale: float,
    grad_scale_factor: Tensor | None,
    partial_counts: Tensor,
    partial_updates: Tensor,
    counts: Tensor,
    updates: Tensor,
) -> None:
    """The fields of `AdamwPublish`."""
    programs = min(MAX_PROGRAMS, rows * triton.cdiv(columns, BLOCK))
    with torch.cuda.device_of(exp_avg):
        _adamw_publish_kernel[(programs,)](
            grad, master, exp_avg, exp_avg_sq, as_bits(published), published.stride(0),
            rows, columns, float(decay), float(grad_weight), float(beta2), float(square_weight),
            float(step_size), float(root_scale), float(eps), float(grad_scale), grad_scale_factor,
            partial_counts, partial_updates, DTYPE=DTYPES[published.dtype], BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        _adamw_sum_kernel[(1,)](
            partial_counts, partial_updates, programs, counts, updates, MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
