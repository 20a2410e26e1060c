"""Logarithms of logistic functions, as in `csrc/math/logistic.h`."""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 or so: x log(u) / (u - 1) with u = 1 + x gives back what the
    rounding of u took.
    """
    u = 1.0 + x
    below = u - 1.0
    return tl.where(below == 0, x, tl.log(u) * (x / tl.where(below == 0, 1.0, below)))


@triton.jit
def log_sigmoid(x):
    """Value and derivative."""
    e = tl.exp(-tl.abs(x))
    derivative = tl.where(x > 0, e, 1.0) / (1.0 + e)
    return tl.where(x < 0, x, 0.0) - log1p(e), derivative


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0."""
    # sum of x^n / n!, n = 1 .. 9: the next term is below 1e-8 of the sum at |x| = 0.75
    series = x * (1.0 / 362880.0) + 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(x > -0.75, series * x, tl.exp(x) - 1.0)


@triton.jit
def log1mexp(x):
    """log(1 - e^x) for x < 0."""
    return tl.where(x > -LN_2, tl.log(-expm1(x)), log1p(-tl.exp(x)))
