"""Clipped policy loss, gradient and metrics: a program a sequence, then one that adds them up.

The sequences are added in their order, so the result does not depend on timing. The formulas are
those of `csrc/math/policy_loss.h`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import kernel, strided

BLOCK = 512
WARPS = 8
REDUCE_BLOCK = 128

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(1.9259629911266175e-8)  # log2(e) less its rounding to float32
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# rows of the metrics vector, `kernels.policy_loss.METRICS`
NUM_METRICS = tl.constexpr(10)
RATIO_MIN = tl.constexpr(6)
RATIO_MAX = tl.constexpr(7)


@triton.jit
def _exp(x):
    # the rounding of x log2(e) alone would cost 20 units in the last place at x = 20
    exponent = x * LOG2_E
    rest = tl.fma(x, LOG2_E, -exponent) + x * LOG2_E_LOW
    return tl.exp2(exponent) * (1.0 + rest * LN_2)


@triton.jit
def _exp_minus_1_minus_x(x):
    # sum of x^n / n!, n = 2 .. 8: the next term is below 4e-8 of the sum at |x| = 1/2
    series = x * (1.0 / 40320.0) + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.5, series * x * x, _exp(x) - 1.0 - x)


@triton.jit
def _clamp(x, low, high):
    # by comparison, so that NaN stays
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)


@triton.jit
def _is_outside(x, limit):
    # a NaN is not: it reaches the gradient
    return (x > limit) | (x < -limit)


@triton.jit
def _surrogate(ratio, advantage, ratio_low, ratio_high):
    """min(ratio A, clip(ratio) A), its derivative in log ratio, and which bound made it smaller."""
    unclipped = ratio * advantage
    clipped = _clamp(ratio, ratio_low, ratio_high) * advantage
    # false on a tie, where autograd lets the gradient through
    is_clipped = clipped < unclipped
    value = tl.where(is_clipped, clipped, unclipped)
    derivative = tl.where(is_clipped, 0.0, unclipped)
    return value, derivative, is_clipped & (ratio < ratio_low), is_clipped & (ratio > ratio_high)


@triton.jit
def _kl_estimate(logp, ref, limit, KL: tl.constexpr):
    """Value and derivative with respect to logp of k1, k2 or k3."""
    difference = ref - logp
    if KL == 1:
        value = -difference
        derivative = tl.full(value.shape, 1.0, tl.float32)
    elif KL == 2:
        value = 0.5 * difference * difference
        derivative = -difference
    else:
        bounded = _clamp(difference, -limit, limit)
        value = _exp_minus_1_minus_x(bounded)
        # 1 - e^(ref - logp): at ref = logp all digits of the difference matter
        derivative = tl.where(_is_outside(difference, limit), 0.0, -(value + bounded))
    return value, derivative


@triton.jit
def _load(ptr, token, stride, keep):
    return tl.load(ptr + token * stride, mask=keep, other=0).to(tl.float32)


@triton.jit
def _valid(mask_ptr, token, stride, length):
    keep = token < length
    if mask_ptr is not None:
        keep &= tl.load(mask_ptr + token * stride, mask=keep, other=0) != 0
    return keep


@triton.jit
def _bounds(sequence, steps, cu_seqlens_ptr):
    """Step at which a sequence begins in its row, its length, and where its gradient begins."""
    if cu_seqlens_ptr is None:
        first = tl.zeros_like(sequence)
        length = steps
        grad_start = sequence * steps
    else:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first
        grad_start = first
    return first, length, grad_start


@triton.jit
def _sequence_sums(
    logprobs_ptr, logprobs_stride, old_ptr, old_stride, mask_ptr, mask_stride, length,
    BLOCK: tl.constexpr, WITH_RATIO: tl.constexpr,
):  # fmt: skip
    """Sum of the log ratio (0 unless WITH_RATIO) and number of valid tokens of a sequence."""
    log_ratio = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = _valid(mask_ptr, token, mask_stride, length)
        count += tl.where(keep, 1.0, 0.0)
        if WITH_RATIO:
            log_ratio += _load(logprobs_ptr, token, logprobs_stride, keep)
            log_ratio -= _load(old_ptr, token, old_stride, keep)
    return tl.sum(log_ratio), tl.sum(count)


@triton.jit
def _store_sequence_gradient(
    logprobs_ptr, logprobs_stride, ref_ptr, ref_stride, mask_ptr, mask_stride, grad_ptr, length,
    policy_gradient, weighted_kl_coef, limit, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient that all tokens of a sequence share, plus that of their own KL terms."""
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = _valid(mask_ptr, token, mask_stride, length)
        gradient = tl.zeros([BLOCK], tl.float32) + policy_gradient
        if KL != 0:
            logp = _load(logprobs_ptr, token, logprobs_stride, keep)
            ref = _load(ref_ptr, token, ref_stride, keep)
            _, kl_derivative = _kl_estimate(logp, ref, limit, KL)
            gradient += weighted_kl_coef * kl_derivative
        tl.store(grad_ptr + token, tl.where(keep, gradient, 0.0), mask=token < length)


@kernel()
def _policy_loss_kernel(
    logprobs_ptr, logprobs_stride_b: tl.int64, logprobs_stride_t: tl.int64,
    old_ptr, old_stride_b: tl.int64, old_stride_t: tl.int64,
    advantages_ptr, advantages_stride_b: tl.int64, advantages_stride_t: tl.int64,
    ref_ptr, ref_stride_b: tl.int64, ref_stride_t: tl.int64,
    mask_ptr, mask_stride_b: tl.int64, mask_stride_t: tl.int64,
    cu_seqlens_ptr, steps: tl.int64,
    ratio_low: tl.float32, ratio_high: tl.float32, kl_coef: tl.float32, limit: tl.float32,
    denominator_ptr, grad_ptr, partials_ptr,
    SEQUENCE_LEVEL: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, KL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    first, length, grad_start = _bounds(sequence, steps, cu_seqlens_ptr)
    logprobs_ptr += sequence * logprobs_stride_b + first * logprobs_stride_t
    old_ptr += sequence * old_stride_b + first * old_stride_t
    advantages_ptr += sequence * advantages_stride_b + first * advantages_stride_t
    if KL != 0:
        ref_ptr += sequence * ref_stride_b + first * ref_stride_t
    if mask_ptr is not None:
        mask_ptr += sequence * mask_stride_b + first * mask_stride_t

    if grad_ptr is not None:
        grad_ptr += grad_start
    partials_ptr += sequence * NUM_METRICS

    tokens = tl.maximum(length, 1).to(tl.float32)
    log_ratio_sum = 0.0
    if SEQUENCE_LEVEL or (SEQUENCE_MEAN and mask_ptr is not None):
        log_ratio_sum, count = _sequence_sums(
            logprobs_ptr, logprobs_stride_t, old_ptr, old_stride_t, mask_ptr, mask_stride_t,
            length, BLOCK, SEQUENCE_LEVEL,
        )  # fmt: skip
        tokens = tl.maximum(count, 1.0)
    denominator = tl.load(denominator_ptr)
    weight = tl.where(denominator > 0, 1.0 / denominator, 0.0)
    if SEQUENCE_MEAN:
        weight /= tokens

    zeros = tl.zeros([BLOCK], tl.float32)
    valid_sum, surrogate_sum, derivative_sum, ratio_sum = zeros, zeros, zeros, zeros
    clipped_low, clipped_high, approx_kl_sum, kl_sum = zeros, zeros, zeros, zeros
    ratio_min, ratio_max = zeros + INF, zeros - INF
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = _valid(mask_ptr, token, mask_stride_t, length)
        logp = _load(logprobs_ptr, token, logprobs_stride_t, keep)
        advantage = _load(advantages_ptr, token, advantages_stride_t, keep)
        if SEQUENCE_LEVEL:
            log_ratio = zeros + log_ratio_sum / tokens
        else:
            log_ratio = logp - _load(old_ptr, token, old_stride_t, keep)
        bounded = _clamp(log_ratio, -limit, limit)
        ratio = _exp(bounded)
        value, derivative, low, high = _surrogate(ratio, advantage, ratio_low, ratio_high)
        derivative = tl.where(keep & ~_is_outside(log_ratio, limit), derivative, 0.0)
        valid_sum += tl.where(keep, 1.0, 0.0)
        surrogate_sum += tl.where(keep, value, 0.0)
        clipped_low += tl.where(keep & low, 1.0, 0.0)
        clipped_high += tl.where(keep & high, 1.0, 0.0)
        ratio_sum += tl.where(keep, ratio, 0.0)
        ratio_min = tl.minimum(ratio_min, tl.where(keep, ratio, INF))
        ratio_max = tl.maximum(ratio_max, tl.where(keep, ratio, -INF))
        approx_kl_sum += tl.where(keep, _exp_minus_1_minus_x(bounded), 0.0)
        derivative_sum += derivative
        gradient = -weight * derivative
        if KL != 0:
            ref = _load(ref_ptr, token, ref_stride_t, keep)
            kl, kl_derivative = _kl_estimate(logp, ref, limit, KL)
            kl_sum += tl.where(keep, kl, 0.0)
            gradient += weight * kl_coef * kl_derivative
        if not SEQUENCE_LEVEL and grad_ptr is not None:
            tl.store(grad_ptr + token, tl.where(keep, gradient, 0.0), mask=token < length)

    tl.store(partials_ptr, -weight * tl.sum(surrogate_sum))
    tl.store(partials_ptr + 1, weight * tl.sum(kl_sum))
    tl.store(partials_ptr + 2, tl.sum(valid_sum))
    tl.store(partials_ptr + 3, tl.sum(clipped_low))
    tl.store(partials_ptr + 4, tl.sum(clipped_high))
    tl.store(partials_ptr + 5, tl.sum(ratio_sum))
    tl.store(partials_ptr + RATIO_MIN, tl.min(ratio_min))
    tl.store(partials_ptr + RATIO_MAX, tl.max(ratio_max))
    tl.store(partials_ptr + 8, tl.sum(approx_kl_sum))
    tl.store(partials_ptr + 9, tl.sum(kl_sum))
    if SEQUENCE_LEVEL and grad_ptr is not None:
        _store_sequence_gradient(
            logprobs_ptr, logprobs_stride_t, ref_ptr, ref_stride_t, mask_ptr, mask_stride_t,
            grad_ptr, length, -weight * tl.sum(derivative_sum) / tokens, weight * kl_coef, limit,
            KL, BLOCK,
        )  # fmt: skip


@kernel()
def _reduce_kernel(
    partials_ptr, sequences: tl.int64, kl_coef: tl.float32, loss_ptr, metrics_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    metric = tl.arange(0, 16)
    columns = metric[None, :]
    total = tl.zeros([BLOCK, 16], tl.float32)
    ratio_min = tl.full([BLOCK], INF, tl.float32)
    ratio_max = tl.full([BLOCK], -INF, tl.float32)
    for start in range(0, sequences, BLOCK):
        sequence = start + tl.arange(0, BLOCK)
        rows = partials_ptr + sequence * NUM_METRICS
        inside = sequence < sequences
        total += tl.load(
            rows[:, None] + columns, mask=inside[:, None] & (columns < NUM_METRICS), other=0
        )
        ratio_min = tl.minimum(ratio_min, tl.load(rows + RATIO_MIN, mask=inside, other=INF))
        ratio_max = tl.maximum(ratio_max, tl.load(rows + RATIO_MAX, mask=inside, other=-INF))
    metrics = tl.sum(total, 0)
    metrics = tl.where(metric == RATIO_MIN, tl.min(ratio_min), metrics)
    metrics = tl.where(metric == RATIO_MAX, tl.max(ratio_max), metrics)
    tl.store(metrics_ptr + metric, metrics, mask=metric < NUM_METRICS)
    share = tl.where(metric == 0, 1.0, tl.where(metric == 1, kl_coef, 0.0))
    tl.store(loss_ptr, tl.sum(tl.where(metric < 2, share * metrics, 0.0)))


def policy_loss(
    sequences: int,
    steps: int,
    cu_seqlens: Tensor | None,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    sequence_level: bool,
    sequence_mean: bool,
    ratio_low: float,
    ratio_high: float,
    kl: int,
    kl_coef: float,
    log_ratio_limit: float,
    denominator: Tensor,
    grad_logprobs: Tensor | None,
    partials: Tensor,
    loss: Tensor,
    metrics: Tensor,
) -> None:
    """The fields of `PolicyLoss`."""
    with torch.cuda.device_of(logprobs):
        if sequences:
            _policy_loss_kernel[(sequences,)](
                *strided(logprobs), *strided(old_logprobs), *strided(advantages),
                *strided(ref_logprobs), *strided(mask), cu_seqlens, steps,
                float(ratio_low), float(ratio_high), float(kl_coef), float(log_ratio_limit),
                denominator, grad_logprobs, partials,
                SEQUENCE_LEVEL=sequence_level, SEQUENCE_MEAN=sequence_mean, KL=kl,
                BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        _reduce_kernel[(1,)](
            partials, sequences, float(kl_coef), loss, metrics,
            BLOCK=REDUCE_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
