"""AdamW rounded into the published weights in one pass; a second launch adds up the counts.

The published weights pass as bits: they are what the fingerprint reads, and Triton's interpreter
would truncate where a GPU rounds.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.adamw_publish import AdamwPublishArguments
from warpo.kernels._triton.fingerprint import (
    INCREMENT,
    as_bits,
    fingerprint_terms,
    offset_of,
    splitmix64,
    unsigned,
)
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
def _round_at_random(value, random):
    """To bfloat16, up or down, by the 16 low bits of `random`; the bits as uint32."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF).to(tl.uint32)) >> 16
    return tl.where(value == value, rounded, 0x7FC0)


@triton.jit
def _load_moment(pointers, inside):
    moment = tl.load(pointers, mask=inside, other=0)
    if moment.dtype == tl.int16:
        moment = _value_of(unsigned(moment), BFLOAT16)
    return moment


@triton.jit
def _store_moment(pointers, value, random, inside, STOCHASTIC: tl.constexpr):
    if pointers.dtype.element_ty == tl.int16:
        bits = _round_at_random(value, random) if STOCHASTIC else _round_to_bits(value, BFLOAT16)
        tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


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
    grad_ptr,
    master_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    published_ptr,
    published_stride: tl.int64,
    columns: tl.int64,
    size: tl.int64,
    decay: tl.float32,
    grad_weight: tl.float32,
    beta2: tl.float32,
    square_weight: tl.float32,
    step_size: tl.float32,
    root_scale: tl.float32,
    eps: tl.float32,
    grad_scale: tl.float32,
    grad_scale_factor_ptr,
    seed: tl.int64,
    step: tl.int64,
    partial_counts_ptr,
    partial_updates_ptr,
    STOCHASTIC: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if grad_scale_factor_ptr is not None:
        grad_scale *= tl.load(grad_scale_factor_ptr)
    key = splitmix64((seed.to(tl.uint64) + 1) * INCREMENT)
    key = splitmix64(key + step.to(tl.uint64) * INCREMENT)
    PER_WORD: tl.constexpr = 2 if DTYPE == 0 else 4
    fingerprint = tl.zeros([BLOCK // PER_WORD], tl.int64)
    changed = tl.zeros([BLOCK], tl.int64)
    master_update = tl.zeros([BLOCK], tl.float32)
    published_update = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, (size + BLOCK - 1) // BLOCK, tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32) * grad_scale
        exp_avg = _load_moment(exp_avg_ptr + at, inside)
        exp_avg_sq = _load_moment(exp_avg_sq_ptr + at, inside)
        random = splitmix64(key + (at + 1).to(tl.uint64) * INCREMENT)
        pointers = published_ptr + offset_of(at, columns, size, published_stride)
        before = unsigned(tl.load(pointers, mask=inside, other=0))
        if master_ptr is None:
            old = _value_of(before, DTYPE)
        else:
            old = tl.load(master_ptr + at, mask=inside, other=0)

        exp_avg += grad_weight * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + square_weight * (grad * grad)
        root = tl.sqrt_rn(exp_avg_sq) * root_scale + eps
        new = decay * old - step_size * tl.div_rn(exp_avg, root)
        if STOCHASTIC and master_ptr is None and DTYPE == BFLOAT16:
            bits = _round_at_random(new, random)
        else:
            bits = _round_to_bits(new, DTYPE)
        bits = tl.where(inside, bits, 0)

        if master_ptr is not None:
            tl.store(master_ptr + at, new, mask=inside)
        _store_moment(exp_avg_ptr + at, exp_avg, random >> 16, inside, STOCHASTIC)
        _store_moment(exp_avg_sq_ptr + at, exp_avg_sq, random >> 32, inside, STOCHASTIC)
        if DTYPE == 0:
            tl.store(pointers, bits.to(tl.int32, bitcast=True), mask=inside)
        else:
            tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        fingerprint += fingerprint_terms(tile, size, bits, PER_WORD, BLOCK)
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
    partial_counts_ptr,
    partial_updates_ptr,
    programs: tl.int64,
    counts_ptr,
    updates_ptr,
    MAX_PROGRAMS: tl.constexpr,
):
    part = tl.arange(0, MAX_PROGRAMS)
    exists = part < programs
    for which in tl.static_range(2):
        counts = tl.load(partial_counts_ptr + 2 * part + which, mask=exists, other=0)
        updates = tl.load(partial_updates_ptr + 2 * part + which, mask=exists, other=0.0)
        tl.store(counts_ptr + which, tl.sum(counts))
        tl.store(updates_ptr + which, tl.sum(updates))


def adamw_publish(a: AdamwPublishArguments) -> None:
    size = a.rows * a.columns
    programs = min(MAX_PROGRAMS, triton.cdiv(size, BLOCK))
    exp_avg, exp_avg_sq = a.exp_avg, a.exp_avg_sq
    if exp_avg.dtype == torch.bfloat16:
        exp_avg, exp_avg_sq = as_bits(exp_avg), as_bits(exp_avg_sq)
    numbers = (a.decay, a.grad_weight, a.beta2, a.square_weight, a.step_size, a.root_scale, a.eps)
    with torch.cuda.device_of(exp_avg):
        _adamw_publish_kernel[(programs,)](
            a.grad,
            a.master,
            exp_avg,
            exp_avg_sq,
            as_bits(a.published),
            a.published.stride(0),
            a.columns,
            size,
            *map(float, numbers),
            float(a.grad_scale),
            a.grad_scale_factor,
            a.seed,
            a.step,
            a.partial_counts,
            a.partial_updates,
            STOCHASTIC=a.stochastic,
            DTYPE=DTYPES[a.published.dtype],
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        _adamw_sum_kernel[(1,)](
            a.partial_counts,
            a.partial_updates,
            programs,
            a.counts,
            a.updates,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4,
            enable_fp_fusion=True,
        )
