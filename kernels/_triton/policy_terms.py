"""The terms of a policy loss for a block of tokens: the formulas of `csrc/math/policy_loss.h`."""

import math

import triton
import triton.language as tl

from warpo.kernels._arguments.objective import ObjectiveArguments

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(1.9259629911266175e-8)  # log2(e) less its rounding to float32
LN_2 = tl.constexpr(0.6931471805599453)
# the enumerations of csrc/arguments/policy_loss.h
K1, K2, REVERSE_K3 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
OF_REFERENCE = tl.constexpr(4)
SEQUENCE_RATIO, PREFIX_RATIO, PRODUCT_RATIO = (tl.constexpr(i) for i in range(1, 4))
CLIP, DUAL_CLIP, STOP_GRADIENT, MASK_OUTSIDE = (tl.constexpr(i) for i in range(4))
REINFORCE, GEOMETRIC, SOFT_GATE = (tl.constexpr(i) for i in range(5, 8))
DIVERGENCE_TV, DIVERGENCE_KL, GAMMA = (tl.constexpr(i) for i in range(8, 11))
TRUNCATE, TRUNCATE_MASK_NAN = tl.constexpr(1), tl.constexpr(3)


@triton.jit
def exp(x):
    # the rounding of x log2(e) alone would cost 20 units in the last place at x = 20
    exponent = x * LOG2_E
    rest = tl.fma(x, LOG2_E, -exponent) + x * LOG2_E_LOW
    return tl.exp2(exponent) * (1.0 + rest * LN_2)


@triton.jit
def exponential_of(x):
    """e^x, e^x - 1 and e^x - 1 - x, the latter two without cancellation."""
    # sum of x^n / n!, n = 2 .. 8: the next term is below 4e-8 of the sum at |x| = 1/2
    series = x * (1.0 / 40320.0) + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series *= x * x
    value = exp(tl.where(x < -85.0, -85.0, x))  # e^-85 is nothing next to 1
    growth = value - 1.0
    near = tl.abs(x) < 0.5
    return value, tl.where(near, series + x, growth), tl.where(near, series, growth - x)


@triton.jit
def clamp(x, low, high):
    # by comparison, so that NaN stays
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)


@triton.jit
def is_outside(x, limit):
    # a NaN is not: it reaches the gradient
    return (x > limit) | (x < -limit)


@triton.jit
def binary_divergence(old, logp, OF_KL: tl.constexpr):
    """Of the distributions of "this token or another": total variation or KL(old || new)."""
    before, now = clamp(old, -85.0, 0.0), tl.where(logp > 0.0, 0.0, logp)
    p_old, others_old, _ = exponential_of(before)
    p, others, _ = exponential_of(now)
    if not OF_KL:
        return tl.abs(p - p_old)
    of_others = tl.where(others_old < 0.0, -others_old * tl.log(others_old / others), 0.0)
    return p_old * (before - now) + of_others


def surrogate_bounds(objective: ObjectiveArguments) -> tuple[float, ...]:
    """What `surrogate_terms` takes as bounds: of GAMMA the powers, the rates as the last two."""
    o = objective
    if o.surrogate == GAMMA.value:
        return o.power_positive, o.power_negative, o.dual_clip, o.rate_positive, o.rate_negative
    low, high = o.ratio_low, o.ratio_high
    if o.surrogate == GEOMETRIC.value:
        low, high = _log(low), _log(high)
    return low, high, o.dual_clip, o.tau_positive, o.tau_negative


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


@triton.jit
def surrogate_terms(ratio, logp, advantage, bounds, SURROGATE: tl.constexpr):
    """The surrogate, its derivatives in log ratio and in logp outside of it, and the active bounds.

    The bounds of GEOMETRIC are active before this, in `geometric_log_ratio`.
    """
    low, high, dual_clip, tau_positive, tau_negative = bounds
    zeros = tl.zeros_like(ratio)
    unclipped = ratio * advantage
    value, by_log_ratio, by_logp = unclipped, unclipped, zeros
    below, above = ratio < low, ratio > high
    is_low, is_high, is_dual = zeros != 0, zeros != 0, zeros != 0
    if SURROGATE == CLIP or SURROGATE == DUAL_CLIP:  # noqa: SIM109
        clipped = clamp(ratio, low, high) * advantage
        # false on a tie, where autograd lets the gradient through
        is_clipped = clipped < unclipped
        value = tl.where(is_clipped, clipped, unclipped)
        is_low, is_high = is_clipped & below, is_clipped & above
        if SURROGATE == DUAL_CLIP:
            floor = dual_clip * advantage
            is_dual = (advantage < 0) & (value < floor)
            value = tl.where(is_dual, floor, value)
        by_log_ratio = tl.where(is_clipped | is_dual, 0.0, unclipped)
    elif SURROGATE == STOP_GRADIENT:
        by_logp = clamp(ratio, low, high) * advantage
        value, by_log_ratio = by_logp * logp, zeros
        is_low, is_high = below, above
    elif SURROGATE == MASK_OUTSIDE:
        value = tl.where(below | above, 0.0, unclipped)
        by_log_ratio = value
        is_low, is_high = below, above
    elif SURROGATE == REINFORCE:
        value, by_log_ratio, by_logp = advantage * logp, zeros, advantage
    elif SURROGATE == SOFT_GATE:
        tau = tl.where(advantage > 0, tau_positive, tau_negative)
        e = exp(-tau * (ratio - 1.0))
        sigmoid = 1.0 / (1.0 + e)
        value = 4.0 / tau * sigmoid * advantage
        # sigmoid' = e sigmoid^2: 1 - sigmoid would lose its digits near 1
        by_log_ratio = 4.0 * (e * sigmoid * sigmoid) * unclipped
    elif SURROGATE == DIVERGENCE_TV or SURROGATE == DIVERGENCE_KL:  # noqa: SIM109
        divergence = binary_divergence(logp - tl.log(ratio), logp, SURROGATE == DIVERGENCE_KL)
        is_low = (advantage < 0) & (ratio < 1) & (divergence > 1.0 - low)
        is_high = (advantage > 0) & (ratio > 1) & (divergence > high - 1.0)
        value = tl.where(is_low | is_high, 0.0, unclipped)
        by_log_ratio = value
    elif SURROGATE == GAMMA:
        power = tl.where(advantage < 0, high, low)
        rate = tl.where(advantage < 0, tau_negative, tau_positive)
        by_logp = exp(power * tl.log(ratio) - rate * (ratio - 1.0)) * advantage
        value, by_log_ratio = by_logp * logp, zeros
    return value, by_log_ratio, by_logp, is_low, is_high, is_dual


@triton.jit
def geometric_log_ratio(log_ratio, advantage, bounds):
    """A token's share in the mean of GEOMETRIC, and which bound holds it: no gradient then."""
    log_low, log_high, _, _, _ = bounds
    is_low = (advantage < 0) & (log_ratio < log_low)
    is_high = (advantage >= 0) & (log_ratio > log_high)
    log_ratio = tl.where(is_low, log_low, tl.where(is_high, log_high, log_ratio))
    return log_ratio, is_low, is_high


@triton.jit
def correction_weight(log_weight, bounds, limit, CORRECTION: tl.constexpr):
    """Weight of a token's surrogate, and whether a bound changed it."""
    low, high = bounds
    weight = exp(clamp(log_weight, -limit, limit))
    outside = (weight < low) | (weight > high)
    if CORRECTION == TRUNCATE or CORRECTION == TRUNCATE_MASK_NAN:  # noqa: SIM109
        weight = clamp(weight, low, high)
    else:
        weight = tl.where(outside, 0.0, weight)
    if CORRECTION >= TRUNCATE_MASK_NAN:
        outside |= weight != weight
        weight = tl.where(weight != weight, 0.0, weight)
    return weight, outside


@triton.jit
def reverse_k3(x):
    """e^x x - (e^x - 1), and less its derivative."""
    value, growth, series = exponential_of(x)
    bounded = tl.where(x < -85.0, -85.0, x)  # there e^x x is nothing next to 1
    near = tl.abs(x) < 0.5
    return tl.where(near, growth * x - series, value * (bounded - 1.0) + 1.0), -value * bounded


@triton.jit
def kl_of_difference(difference, limit, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """Value and derivative with respect to logp; difference: ref - logp, or that summed over a
    sequence.
    """
    # who drew the token stands first: the two change places
    ESTIMATOR: tl.constexpr = KL - OF_REFERENCE if KL > OF_REFERENCE else KL
    SIGN: tl.constexpr = -1.0 if KL > OF_REFERENCE else 1.0
    d = SIGN * difference
    bounded = tl.where(d > limit, limit, d)
    if ESTIMATOR == K1:
        value = -d
        derivative = tl.full(value.shape, 1.0, tl.float32)
    elif ESTIMATOR == K2:
        value = 0.5 * d * d
        derivative = -d
    elif ESTIMATOR == REVERSE_K3:
        value, derivative = reverse_k3(bounded)
        derivative = tl.where(d > limit, 0.0, derivative)
    else:
        # k3 needs a bound from above only: e^d overflows there; at ref = logp all digits matter
        _, growth, value = exponential_of(bounded)
        derivative = tl.where(d > limit, 0.0, -growth)
    if STRAIGHT_THROUGH:
        derivative = -d
    return value, SIGN * derivative


@triton.jit
def kl_estimate(logp, ref, limit, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    return kl_of_difference(ref - logp, limit, KL, STRAIGHT_THROUGH)
