"""What a policy loss takes of a whole sequence before its tokens: counts, sums, the derivative that
they share.

`views` are those of logprobs, old logprobs, advantages, reference, sampler, entropy and mask.
"""

import triton
import triton.language as tl

from warpo.kernels._triton.policy_terms import (
    GEOMETRIC,
    clamp,
    correction_weight,
    exp,
    geometric_log_ratio,
    is_outside,
    kl_of_difference,
    surrogate_terms,
)
from warpo.kernels._triton.sequences import valid_tokens


@triton.jit
def load(view, token, keep):
    """Of a view, which is the pointer to the first token of the sequence and the stride."""
    return tl.load(view[0] + token * view[1], mask=keep, other=0).to(tl.float32)


@triton.jit
def valid(mask, token, end):
    return valid_tokens(mask[0], token, mask[1], end)


@triton.jit
def sequence_sums(
    views,
    length,
    bounds,
    SURROGATE: tl.constexpr,
    WITH_RATIO: tl.constexpr,
    WITH_CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Valid tokens of a sequence, and its sums of log ratio and of log correction, where asked."""
    logprobs, old_logprobs, advantages = views[0], views[1], views[2]
    sampler, mask = views[4], views[6]
    count = tl.zeros([BLOCK], tl.float32)
    log_ratio_sum = tl.zeros([BLOCK], tl.float32)
    log_weight_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid(mask, token, length)
        count += tl.where(keep, 1.0, 0.0)
        if WITH_RATIO or WITH_CORRECTION:
            old = load(old_logprobs, token, keep)
        if WITH_RATIO:
            log_ratio = load(logprobs, token, keep) - old
            if SURROGATE == GEOMETRIC:
                advantage = load(advantages, token, keep)
                log_ratio, _, _ = geometric_log_ratio(log_ratio, advantage, bounds)
            # also where masked: a bound may lie on either side of 0
            log_ratio_sum += tl.where(keep, log_ratio, 0.0)
        if WITH_CORRECTION:
            log_weight_sum += old - load(sampler, token, keep)
    return tl.sum(count), tl.sum(log_ratio_sum), tl.sum(log_weight_sum)


@triton.jit
def sequence_kl(
    views, length, limit, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr
):
    """The KL of a sequence, which each of its tokens has, and what a token moves that of all by."""
    logprobs, ref_logprobs, mask = views[0], views[3], views[6]
    count = tl.zeros([BLOCK], tl.float32)
    difference = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid(mask, token, length)
        count += tl.where(keep, 1.0, 0.0)
        difference += load(ref_logprobs, token, keep) - load(logprobs, token, keep)
    total = tl.zeros([BLOCK], tl.float32) + tl.sum(difference)
    value, derivative = kl_of_difference(total, limit, KL, STRAIGHT_THROUGH)
    return value, derivative * tl.sum(count)


@triton.jit
def sum_by_log_ratio(
    views,
    length,
    log_ratio,
    log_weight,
    bounds,
    correction_bounds,
    limit,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    CORRECTION_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Derivative of the surrogates of a sequence in the log ratio that they share."""
    old_logprobs, advantages, sampler, mask = views[1], views[2], views[4], views[6]
    total = tl.zeros([BLOCK], tl.float32)
    log_weight += total
    ratio = exp(clamp(log_ratio + total, -limit, limit))
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid(mask, token, length)
        advantage = load(advantages, token, keep)
        # logp does not enter the derivative
        _, derivative, _, _, _, _ = surrogate_terms(ratio, ratio, advantage, bounds, SURROGATE)
        if CORRECTION != 0:
            if not CORRECTION_SEQUENCE:
                log_weight = load(old_logprobs, token, keep) - load(sampler, token, keep)
            derivative *= correction_weight(log_weight, correction_bounds, limit, CORRECTION)[0]
        total += tl.where(keep, derivative, 0.0)
    return tl.where(is_outside(log_ratio, limit), 0.0, tl.sum(total))
