"""The tokens of a part of a sequence: their gradients and their sums for loss and metrics."""

import triton
import triton.language as tl

from warpo.kernels._policy_metrics import METRICS
from warpo.kernels._triton.policy_sequence import load, valid
from warpo.kernels._triton.policy_terms import (
    GEOMETRIC,
    PREFIX_RATIO,
    PRODUCT_RATIO,
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
from warpo.kernels._triton.sequences import weighted

INF = tl.constexpr(float("inf"))
NUM_METRICS = tl.constexpr(len(METRICS))
RATIO_MIN = tl.constexpr(METRICS.index("ratio_min"))
RATIO_MAX = tl.constexpr(METRICS.index("ratio_max"))


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
def part(
    views,
    begin,
    end,
    of_sequence,
    weight,
    bounds,
    correction_bounds,
    coefficients,
    limit,
    outputs,
    RATIO_LEVEL: tl.constexpr,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    CORRECTION_SEQUENCE: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    KL_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients and partial sums of the tokens from begin to end of a sequence."""
    logprobs, old_logprobs, advantages, ref_logprobs, sampler, entropies, mask = views
    sequence_log_ratio, sequence_log_weight, shared_derivative, sequence_kl = of_sequence
    SHARED: tl.constexpr = RATIO_LEVEL == SEQUENCE_RATIO or RATIO_LEVEL == PRODUCT_RATIO  # noqa: SIM109
    kl_coef, entropy_coef = coefficients
    grad_ptr, grad_entropy_ptr, partials_ptr = outputs
    zeros = tl.zeros([BLOCK], tl.float32)
    policy_sum, kl_sum, entropy_sum, valid_sum, ratio_sum = zeros, zeros, zeros, zeros, zeros
    low_sum, high_sum, dual_sum, approx_kl_sum = zeros, zeros, zeros, zeros
    correction_sum, corrected_sum, log_ratio_sum = zeros, zeros, zeros
    ratio_min, ratio_max = zeros + INF, zeros - INF
    prefix, smallest = 0.0, exp(-limit)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid(mask, token, end)
        logp, old = load(logprobs, token, keep), load(old_logprobs, token, keep)
        advantage = load(advantages, token, keep)
        own_log_ratio = logp - old
        log_ratio = own_log_ratio
        if SHARED:
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
                log_weight = old - load(sampler, token, keep)
            correction, corrected = correction_weight(
                log_weight, correction_bounds, limit, CORRECTION
            )
            value, by_log_ratio = value * correction, by_log_ratio * correction
            by_logp *= correction
            corrected_sum += tl.where(keep & corrected, 1.0, 0.0)
        if SHARED:
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
            if KL_SEQUENCE:
                kl, kl_derivative = sequence_kl
            else:
                ref = load(ref_logprobs, token, keep)
                kl, kl_derivative = kl_estimate(logp, ref, limit, KL, STRAIGHT_THROUGH)
            kl_sum += tl.where(keep, kl, 0.0)
            gradient += kl_coef * kl_derivative
        if entropies[0] is not None:
            entropy_sum += load(entropies, token, keep)
        inside = token < end
        if grad_ptr is not None:
            tl.store(grad_ptr + token, tl.where(keep, weighted(weight, gradient), 0.0), mask=inside)
        if grad_entropy_ptr is not None:
            grad_entropy = tl.where(keep, -weight * entropy_coef, zeros)
            tl.store(grad_entropy_ptr + token, grad_entropy, mask=inside)
    sums = (
        policy_sum,
        kl_sum,
        entropy_sum,
        valid_sum,
        low_sum,
        high_sum,
        dual_sum,
        ratio_sum,
        approx_kl_sum,
        correction_sum,
        corrected_sum,
        log_ratio_sum,
    )
    _store_partials(partials_ptr, weight, sums, ratio_min, ratio_max)
