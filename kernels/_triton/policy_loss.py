"""Policy loss, gradients and metrics: a program a sequence or part of it, then one that adds up.

The partial sums are added in the order of the sequences, so the result does not depend on timing.
Where a term needs the whole sequence, each of its programs reads all of it, in one order: no
gradient depends on the number of programs.
"""

import math

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.policy_loss import MIN_PARTIALS, PolicyLossArguments
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.policy_terms import (
    GEOMETRIC,
    PREFIX_RATIO,
    SEQUENCE_RATIO,
    clamp,
    correction_weight,
    exp,
    exponential_of,
    geometric_log_ratio,
    is_outside,
    kl_estimate,
    surrogate_terms,
)
from warpo.kernels._triton.sequences import bounds as bounds_of
from warpo.kernels._triton.sequences import inverse_or_zero, poison_if, valid_tokens, weighted
from warpo.kernels.policy_metrics import METRICS

BLOCK = 256
WARPS = 4
REDUCE_BLOCK = 128

INF = tl.constexpr(float("inf"))
NUM_METRICS = tl.constexpr(len(METRICS))
RATIO_MIN = tl.constexpr(METRICS.index("ratio_min"))
RATIO_MAX = tl.constexpr(METRICS.index("ratio_max"))


@triton.jit
def _load(view, token, keep):
    """Of a view, which is the pointer to the first token of the sequence and the stride."""
    return tl.load(view[0] + token * view[1], mask=keep, other=0).to(tl.float32)


@triton.jit
def _valid(mask, token, end):
    return valid_tokens(mask[0], token, mask[1], end)


@triton.jit
def _sequence_sums(
    logprobs, old_logprobs, advantages, sampler, mask, length, bounds,
    SURROGATE: tl.constexpr, WITH_RATIO: tl.constexpr, WITH_CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Valid tokens of a sequence, and its sums of log ratio and of log correction, where asked."""
    count = tl.zeros([BLOCK], tl.float32)
    log_ratio_sum = tl.zeros([BLOCK], tl.float32)
    log_weight_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = _valid(mask, token, length)
        count += tl.where(keep, 1.0, 0.0)
        if WITH_RATIO or WITH_CORRECTION:
            old = _load(old_logprobs, token, keep)
        if WITH_RATIO:
            log_ratio = _load(logprobs, token, keep) - old
            if SURROGATE == GEOMETRIC:
                advantage = _load(advantages, token, keep)
                log_ratio, _, _ = geometric_log_ratio(log_ratio, advantage, bounds)
            # also where masked: a bound may lie on either side of 0
            log_ratio_sum += tl.where(keep, log_ratio, 0.0)
        if WITH_CORRECTION:
            log_weight_sum += old - _load(sampler, token, keep)
    return tl.sum(count), tl.sum(log_ratio_sum), tl.sum(log_weight_sum)


@triton.jit
def _sum_by_log_ratio(
    log_ratio, log_weight, old_logprobs, advantages, sampler, mask, length, bounds,
    correction_bounds, limit, SURROGATE: tl.constexpr, CORRECTION: tl.constexpr,
    CORRECTION_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Derivative of the surrogates of a sequence in the log ratio that they share."""
    total = tl.zeros([BLOCK], tl.float32)
    log_weight += total
    ratio = exp(clamp(log_ratio + total, -limit, limit))
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = _valid(mask, token, length)
        advantage = _load(advantages, token, keep)
        # logp does not enter the derivative
        _, derivative, _, _, _, _ = surrogate_terms(ratio, ratio, advantage, bounds, SURROGATE)
        if CORRECTION != 0:
            if not CORRECTION_SEQUENCE:
                log_weight = _load(old_logprobs, token, keep) - _load(sampler, token, keep)
            derivative *= correction_weight(log_weight, correction_bounds, limit, CORRECTION)[0]
        total += tl.where(keep, derivative, 0.0)
    return tl.where(is_outside(log_ratio, limit), 0.0, tl.sum(total))


@triton.jit
def _store_partials(partials_ptr, weight, sums, ratio_min, ratio_max):
    policy, kl, entropy, valid, low, high, dual, ratio, approx_kl = sums[:9]
    weights, corrected, log_ratios = sums[9:]
    kl, entropy = tl.sum(kl), tl.sum(entropy)
    tl.store(partials_ptr, weighted(-weight, tl.sum(policy)))
    tl.store(partials_ptr + 1, weighted(weight, kl))
    tl.store(partials_ptr + 2, weighted(weight, entropy))
    tl.store(partials_ptr + 3, tl.sum(valid))
    tl.store(partials_ptr + 4, tl.sum(low))
    tl.store(partials_ptr + 5, tl.sum(high))
    tl.store(partials_ptr + 6, tl.sum(dual))
    tl.store(partials_ptr + 7, tl.sum(ratio))
    tl.store(partials_ptr + RATIO_MIN, tl.min(ratio_min))
    tl.store(partials_ptr + RATIO_MAX, tl.max(ratio_max))
    tl.store(partials_ptr + 10, tl.sum(approx_kl))
    tl.store(partials_ptr + 11, kl)
    tl.store(partials_ptr + 12, entropy)
    tl.store(partials_ptr + 13, tl.sum(weights))
    tl.store(partials_ptr + 14, tl.sum(corrected))
    tl.store(partials_ptr + 15, tl.sum(log_ratios))


@triton.jit
def _part(
    logprobs, old_logprobs, advantages, ref_logprobs, sampler, entropies, mask, begin, end,
    sequence_log_ratio, shared_derivative, sequence_log_weight, weight, bounds,
    correction_bounds, kl_coef, entropy_coef, limit, grad_ptr, grad_entropy_ptr, partials_ptr,
    RATIO_LEVEL: tl.constexpr, SURROGATE: tl.constexpr, CORRECTION: tl.constexpr,
    CORRECTION_SEQUENCE: tl.constexpr, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients and partial sums of the tokens from begin to end of a sequence."""
    zeros = tl.zeros([BLOCK], tl.float32)
    policy_sum, kl_sum, entropy_sum, valid_sum, ratio_sum = zeros, zeros, zeros, zeros, zeros
    low_sum, high_sum, dual_sum, approx_kl_sum = zeros, zeros, zeros, zeros
    correction_sum, corrected_sum, log_ratio_sum = zeros, zeros, zeros
    ratio_min, ratio_max = zeros + INF, zeros - INF
    prefix, smallest = 0.0, exp(-limit)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = _valid(mask, token, end)
        logp, old = _load(logprobs, token, keep), _load(old_logprobs, token, keep)
        advantage = _load(advantages, token, keep)
        own_log_ratio = logp - old
        log_ratio = own_log_ratio
        if RATIO_LEVEL == SEQUENCE_RATIO:
            log_ratio = zeros + sequence_log_ratio
        elif RATIO_LEVEL == PREFIX_RATIO:
            log_ratio = prefix + tl.cumsum(own_log_ratio, 0)
            prefix += tl.sum(own_log_ratio)
        ratio, _, approx_kl = exponential_of(tl.where(log_ratio > limit, limit, log_ratio))
        ratio = tl.where(ratio < smallest, smallest, ratio)
        value, by_log_ratio, by_logp, is_low, is_high, is_dual = surrogate_terms(
            ratio, logp, advantage, bounds, SURROGATE
        )
        if SURROGATE == GEOMETRIC:
            _, is_low, is_high = geometric_log_ratio(own_log_ratio, advantage, bounds)
        by_log_ratio = tl.where(is_outside(log_ratio, limit), 0.0, by_log_ratio)
        correction = zeros + 1.0
        if CORRECTION != 0:
            log_weight = zeros + sequence_log_weight
            if not CORRECTION_SEQUENCE:
                log_weight = old - _load(sampler, token, keep)
            correction, corrected = correction_weight(
                log_weight, correction_bounds, limit, CORRECTION
            )
            value, by_log_ratio = value * correction, by_log_ratio * correction
            by_logp *= correction
            corrected_sum += tl.where(keep & corrected, 1.0, 0.0)
        if RATIO_LEVEL == SEQUENCE_RATIO:
            by_log_ratio = zeros + shared_derivative
            if SURROGATE == GEOMETRIC:
                by_log_ratio = tl.where(is_low | is_high, 0.0, by_log_ratio)
        gradient = -(by_log_ratio + by_logp)
        valid_sum += tl.where(keep, 1.0, 0.0)
        policy_sum += tl.where(keep, value, 0.0)
        correction_sum += tl.where(keep, correction, 0.0)
        low_sum += tl.where(keep & is_low, 1.0, 0.0)
        high_sum += tl.where(keep & is_high, 1.0, 0.0)
        dual_sum += tl.where(keep & is_dual, 1.0, 0.0)
        ratio_sum += tl.where(keep, ratio, 0.0)
        ratio_min = tl.minimum(ratio_min, tl.where(keep, ratio, INF))
        ratio_max = tl.maximum(ratio_max, tl.where(keep, ratio, -INF))
        approx_kl_sum += tl.where(keep, approx_kl, 0.0)
        log_ratio_sum += tl.where(keep, clamp(own_log_ratio, -limit, limit), 0.0)
        if KL != 0:
            ref = _load(ref_logprobs, token, keep)
            kl, kl_derivative = kl_estimate(logp, ref, limit, KL, STRAIGHT_THROUGH)
            kl_sum += tl.where(keep, kl, 0.0)
            gradient += kl_coef * kl_derivative
        if entropies[0] is not None:
            entropy_sum += _load(entropies, token, keep)
        inside = token < end
        if grad_ptr is not None:
            tl.store(grad_ptr + token, tl.where(keep, weighted(weight, gradient), 0.0), mask=inside)
        if grad_entropy_ptr is not None:
            grad_entropy = tl.where(keep, -weight * entropy_coef, zeros)
            tl.store(grad_entropy_ptr + token, grad_entropy, mask=inside)
    sums = (
        policy_sum, kl_sum, entropy_sum, valid_sum, low_sum, high_sum, dual_sum, ratio_sum,
        approx_kl_sum, correction_sum, corrected_sum, log_ratio_sum,
    )  # fmt: skip
    _store_partials(partials_ptr, weight, sums, ratio_min, ratio_max)


@kernel()
def _policy_loss_kernel(
    logprobs_ptr, logprobs_stride_b: tl.int64, logprobs_stride_t: tl.int64,
    old_ptr, old_stride_b: tl.int64, old_stride_t: tl.int64,
    advantages_ptr, advantages_stride_b: tl.int64, advantages_stride_t: tl.int64,
    ref_ptr, ref_stride_b: tl.int64, ref_stride_t: tl.int64,
    sampler_ptr, sampler_stride_b: tl.int64, sampler_stride_t: tl.int64,
    entropy_ptr, entropy_stride_b: tl.int64, entropy_stride_t: tl.int64,
    mask_ptr, mask_stride_b: tl.int64, mask_stride_t: tl.int64,
    cu_seqlens_ptr, steps: tl.int64, parts: tl.int64,
    ratio_low: tl.float32, ratio_high: tl.float32, dual_clip: tl.float32,
    tau_positive: tl.float32, tau_negative: tl.float32,
    correction_low: tl.float32, correction_high: tl.float32,
    kl_coef: tl.float32, adaptive_kl_coef_ptr, entropy_coef: tl.float32, limit: tl.float32,
    denominator_ptr, grad_ptr, grad_entropy_ptr, partials_ptr,
    RATIO_LEVEL: tl.constexpr, SURROGATE: tl.constexpr, CORRECTION: tl.constexpr,
    CORRECTION_SEQUENCE: tl.constexpr, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sequence = program // parts
    first, length, grad_start, malformed = bounds_of(
        sequence, tl.num_programs(0) // parts, steps, cu_seqlens_ptr
    )
    logprobs_ptr += sequence * logprobs_stride_b + first * logprobs_stride_t
    old_ptr += sequence * old_stride_b + first * old_stride_t
    advantages_ptr += sequence * advantages_stride_b + first * advantages_stride_t
    if KL != 0:
        ref_ptr += sequence * ref_stride_b + first * ref_stride_t
    if CORRECTION != 0:
        sampler_ptr += sequence * sampler_stride_b + first * sampler_stride_t
    if entropy_ptr is not None:
        entropy_ptr += sequence * entropy_stride_b + first * entropy_stride_t
    if mask_ptr is not None:
        mask_ptr += sequence * mask_stride_b + first * mask_stride_t
    if grad_ptr is not None:
        grad_ptr += grad_start
    if grad_entropy_ptr is not None:
        grad_entropy_ptr += grad_start
    logprobs, old_logprobs = (logprobs_ptr, logprobs_stride_t), (old_ptr, old_stride_t)
    advantages, ref = (advantages_ptr, advantages_stride_t), (ref_ptr, ref_stride_t)
    sampler, entropies = (sampler_ptr, sampler_stride_t), (entropy_ptr, entropy_stride_t)
    mask = (mask_ptr, mask_stride_t)
    bounds = (ratio_low, ratio_high, dual_clip, tau_positive, tau_negative)
    correction_bounds = (correction_low, correction_high)

    part_length = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    begin = tl.minimum(program % parts * part_length, length)
    end = tl.minimum(begin + part_length, length)
    # a part without tokens needs nothing of its sequence
    whole = tl.where(begin < end, length, 0)
    tokens = length.to(tl.float32)
    log_ratio, log_weight, shared_derivative = 0.0, 0.0, 0.0
    WITH_RATIO: tl.constexpr = RATIO_LEVEL == SEQUENCE_RATIO
    WITH_CORRECTION: tl.constexpr = CORRECTION != 0 and CORRECTION_SEQUENCE
    if WITH_RATIO or WITH_CORRECTION or (SEQUENCE_MEAN and mask_ptr is not None):
        tokens, log_ratio, log_weight = _sequence_sums(
            logprobs, old_logprobs, advantages, sampler, mask, whole, bounds, SURROGATE,
            WITH_RATIO, WITH_CORRECTION, BLOCK,
        )  # fmt: skip
    tokens = tl.maximum(tokens, 1.0)
    if WITH_RATIO:
        log_ratio /= tokens
        if grad_ptr is not None:
            shared_derivative = _sum_by_log_ratio(
                log_ratio, log_weight, old_logprobs, advantages, sampler, mask, whole, bounds,
                correction_bounds, limit, SURROGATE, CORRECTION, CORRECTION_SEQUENCE, BLOCK,
            ) / tokens  # fmt: skip
    weight = inverse_or_zero(tl.load(denominator_ptr))
    if SEQUENCE_MEAN:
        weight /= tokens
    weight = poison_if(malformed, weight)
    if adaptive_kl_coef_ptr is not None:
        kl_coef = tl.load(adaptive_kl_coef_ptr)
    _part(
        logprobs, old_logprobs, advantages, ref, sampler, entropies, mask, begin, end, log_ratio,
        shared_derivative, log_weight, weight, bounds, correction_bounds, kl_coef, entropy_coef,
        limit, grad_ptr, grad_entropy_ptr, partials_ptr + program * NUM_METRICS, RATIO_LEVEL,
        SURROGATE, CORRECTION, CORRECTION_SEQUENCE, KL, STRAIGHT_THROUGH, BLOCK,
    )  # fmt: skip


@kernel()
def _reduce_kernel(
    partials_ptr, rows: tl.int64, kl_coef: tl.float32, adaptive_kl_coef_ptr,
    entropy_coef: tl.float32, loss_ptr, metrics_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    metric = tl.arange(0, NUM_METRICS)
    total = tl.zeros([BLOCK, NUM_METRICS], tl.float32)
    ratio_min = tl.full([BLOCK], INF, tl.float32)
    ratio_max = tl.full([BLOCK], -INF, tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        row_ptr = partials_ptr + row * NUM_METRICS
        inside = row < rows
        total += tl.load(row_ptr[:, None] + metric[None, :], mask=inside[:, None], other=0)
        ratio_min = tl.minimum(ratio_min, tl.load(row_ptr + RATIO_MIN, mask=inside, other=INF))
        ratio_max = tl.maximum(ratio_max, tl.load(row_ptr + RATIO_MAX, mask=inside, other=-INF))
    metrics = tl.sum(total, 0)
    # the comparisons drop a NaN, the sum of the ratios, metric 7, does not
    ratios = tl.sum(tl.where(metric == 7, metrics, 0.0))
    extreme = tl.where(metric == RATIO_MIN, tl.min(ratio_min), tl.max(ratio_max))
    extreme = tl.where(ratios == ratios, extreme, ratios)
    metrics = tl.where((metric == RATIO_MIN) | (metric == RATIO_MAX), extreme, metrics)
    tl.store(metrics_ptr + metric, metrics)
    if adaptive_kl_coef_ptr is not None:
        kl_coef = tl.load(adaptive_kl_coef_ptr)
    share = tl.where(metric == 0, 1.0, tl.where(metric == 1, kl_coef, -entropy_coef))
    counts = (metric < 2) | (metric == 2) & (entropy_coef != 0)
    tl.store(loss_ptr, tl.sum(tl.where(counts, share * metrics, 0.0)))


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _count_parts(a: PolicyLossArguments) -> int:
    """Programs per sequence."""
    # the sums up to a token are made in the order of the tokens
    if a.sequences == 0 or a.objective.ratio_level == PREFIX_RATIO.value:
        return 1
    return max(1, min(MIN_PARTIALS // a.sequences, triton.cdiv(a.steps, BLOCK)))


def policy_loss(a: PolicyLossArguments) -> None:
    o, term, parts = a.objective, a.kl_penalty, _count_parts(a)
    bounds = (o.ratio_low, o.ratio_high)
    if o.surrogate == GEOMETRIC.value:
        bounds = (_log(o.ratio_low), _log(o.ratio_high))
    per_token = (
        a.logprobs,
        a.old_logprobs,
        a.advantages,
        a.ref_logprobs,
        a.sampler_logprobs,
        a.entropy,
        a.mask,
    )
    numbers = [*bounds, o.dual_clip, o.tau_positive, o.tau_negative]
    numbers += [o.correction_low, o.correction_high, term.kl_coef]
    with torch.cuda.device_of(a.logprobs):
        if a.sequences:
            _policy_loss_kernel[(a.sequences * parts,)](
                *[part for tensor in per_token for part in strided(tensor)],
                a.cu_seqlens,
                a.steps,
                parts,
                *map(float, numbers),
                term.adaptive_kl_coef,
                float(o.entropy_coef),
                float(o.log_ratio_limit),
                a.denominator,
                a.grad_logprobs,
                a.grad_entropy,
                a.partials,
                RATIO_LEVEL=o.ratio_level,
                SURROGATE=o.surrogate,
                CORRECTION=o.correction,
                CORRECTION_SEQUENCE=o.correction_sequence,
                KL=term.kl,
                STRAIGHT_THROUGH=o.kl_straight_through,
                SEQUENCE_MEAN=o.sequence_mean,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        _reduce_kernel[(1,)](
            a.partials,
            a.sequences * parts,
            float(term.kl_coef),
            term.adaptive_kl_coef,
            float(o.entropy_coef),
            a.loss,
            a.metrics,
            BLOCK=REDUCE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
