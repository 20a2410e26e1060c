"""Clipped value loss, gradient and metrics: a program a sequence, or a part of one where sequences
are few and long, then one that merges them.

No gradient depends on the number of parts: of its sequence it needs the count of valid tokens,
which each program finds for itself. The formulas are those of `csrc/math/value_loss.h`.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.value_loss import MIN_VALUE_PARTIALS, ValueLossArguments
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.sequences import (
    bounds,
    inverse_denominator,
    inverse_or_zero,
    load_tokens,
    merge_partials,
    poison_if,
    valid_tokens,
    weighted,
)

BLOCK = 512
WARPS = 8
# columns of the metrics vector, `kernels.value_loss.VALUE_METRICS`
NUM_METRICS = tl.constexpr(7)
TOKENS = 1
RETURN_MEAN = 3


@triton.jit
def _huber(x, delta):
    """Value and derivative; by comparison, so that NaN stays."""
    bounded = tl.where(x > delta, delta, x)
    bounded = tl.where(bounded < -delta, -delta, bounded)
    return bounded * (x - 0.5 * bounded), bounded


@triton.jit
def _clipped_value_loss(value, old, target, clip_range, delta):
    low, high = old - clip_range, old + clip_range
    inside = (value >= low) & (value <= high)
    # NaN where either is
    bound = tl.where(value > high, high, tl.where(value < low, low, value + old))
    direct, slope = _huber(value - target, delta)
    clipped, _ = _huber(tl.where(inside, value, bound) - target, delta)
    larger, smaller = direct > clipped, direct < clipped
    loss = tl.where(larger, direct, clipped)
    # torch.max shares the gradient on a tie; a NaN reaches it
    outside = tl.where(smaller, 0.0, tl.where(direct == clipped, 0.5 * slope, direct + clipped))
    return loss, tl.where(inside | larger, slope, outside), ~inside & smaller


@triton.jit
def _count_valid(mask_ptr, stride, length, BLOCK: tl.constexpr):
    """Of a whole sequence."""
    if mask_ptr is None:
        count = length.to(tl.float32)
    else:
        valid = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            token = start + tl.arange(0, BLOCK)
            valid += tl.where(valid_tokens(mask_ptr, token, stride, length), 1.0, 0.0)
        count = tl.sum(valid)
    return count


@kernel()
def _value_loss_kernel(
    values_ptr,
    values_stride_b: tl.int64,
    values_stride_t: tl.int64,
    old_ptr,
    old_stride_b: tl.int64,
    old_stride_t: tl.int64,
    returns_ptr,
    returns_stride_b: tl.int64,
    returns_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    cu_seqlens_ptr,
    steps: tl.int64,
    clip_range: tl.float32,
    delta: tl.float32,
    denominator: tl.float32,
    denominator_ptr,
    grad_ptr,
    partials_ptr,
    SEQUENCE_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    first, length, grad_start, malformed = bounds(
        sequence, tl.num_programs(0), steps, cu_seqlens_ptr
    )
    values_ptr += sequence * values_stride_b + first * values_stride_t
    returns_ptr += sequence * returns_stride_b + first * returns_stride_t
    if old_ptr is not None:
        old_ptr += sequence * old_stride_b + first * old_stride_t
    if mask_ptr is not None:
        mask_ptr += sequence * mask_stride_b + first * mask_stride_t
    if grad_ptr is not None:
        grad_ptr += grad_start

    zeros = tl.zeros([BLOCK], tl.float32)
    valid_sum, return_sum, error_sum = zeros, zeros, zeros
    for start in range(part * BLOCK, length, parts * BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid_tokens(mask_ptr, token, mask_stride_t, length)
        target = load_tokens(returns_ptr, token, returns_stride_t, keep)
        valid_sum += tl.where(keep, 1.0, 0.0)
        return_sum += target
        error_sum += target - load_tokens(values_ptr, token, values_stride_t, keep)
    count = tl.sum(valid_sum)
    share = inverse_or_zero(count)
    return_mean, error_mean = tl.sum(return_sum) * share, tl.sum(error_sum) * share
    weight = inverse_denominator(denominator, denominator_ptr)
    if SEQUENCE_MEAN:
        weight *= inverse_or_zero(_count_valid(mask_ptr, mask_stride_t, length, BLOCK))
    weight = poison_if(malformed, weight)

    loss_sum, clipped_sum, return_m2, error_m2 = zeros, zeros, zeros, zeros
    for start in range(part * BLOCK, length, parts * BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid_tokens(mask_ptr, token, mask_stride_t, length)
        value = load_tokens(values_ptr, token, values_stride_t, keep)
        target = load_tokens(returns_ptr, token, returns_stride_t, keep)
        old = value
        if old_ptr is not None:
            old = load_tokens(old_ptr, token, old_stride_t, keep)
        loss, derivative, clipped = _clipped_value_loss(value, old, target, clip_range, delta)
        loss_sum += tl.where(keep, loss, 0.0)
        clipped_sum += tl.where(keep & clipped, 1.0, 0.0)
        centred, error = target - return_mean, target - value - error_mean
        return_m2 += tl.where(keep, centred * centred, 0.0)
        error_m2 += tl.where(keep, error * error, 0.0)
        if grad_ptr is not None:
            gradient = tl.where(keep, weighted(weight, derivative), 0.0)
            tl.store(grad_ptr + token, gradient, mask=token < length)

    partials_ptr += (sequence * parts + part) * NUM_METRICS
    tl.store(partials_ptr, weighted(weight, tl.sum(loss_sum)))
    tl.store(partials_ptr + 1, count)
    tl.store(partials_ptr + 2, tl.sum(clipped_sum))
    tl.store(partials_ptr + 3, return_mean)
    tl.store(partials_ptr + 4, tl.sum(return_m2))
    tl.store(partials_ptr + 5, error_mean)
    tl.store(partials_ptr + 6, tl.sum(error_m2))


def value_loss(a: ValueLossArguments) -> None:
    parts = 1
    if a.sequences:
        parts = max(1, min(MIN_VALUE_PARTIALS // a.sequences, -(-a.steps // BLOCK)))
    with torch.cuda.device_of(a.values):
        if a.sequences:
            _value_loss_kernel[(a.sequences, parts)](
                *strided(a.values),
                *strided(a.old_values),
                *strided(a.returns),
                *strided(a.mask),
                a.cu_seqlens,
                a.steps,
                float(a.clip_range),
                float(a.huber_delta),
                a.denominator.number,
                a.denominator.tensor,
                a.grad_values,
                a.partials,
                SEQUENCE_MEAN=a.sequence_mean,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        rows = a.sequences * parts
        merge_partials(a.partials, rows, a.loss, a.metrics, TOKENS, RETURN_MEAN)
