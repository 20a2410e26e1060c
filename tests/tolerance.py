"""Every tolerance of the suite, with its reason. Errors are against float64 on the same inputs."""

import torch

from warpo.kernels._matrix_product import own_product

# Rounding to the nearest value of the result type, as a relative error at the start of a binade.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}

# log-sum-exp in float32: the exponential is good to 2 ulp, a sum of V terms in blocks of 4096 to
# sqrt(V) ulp; logp itself is a difference of numbers near |logp|.
LOGPROB_RELATIVE = 2e-6
LOGPROB_ABSOLUTE = 4e-6

# p_j = e^(z_j - m - log d): an absolute error of |z| ulp in the exponent is a relative one in p.
GRADIENT_RELATIVE = 2e-5
GRADIENT_ABSOLUTE = 2e-7

# A logit of a head is a float32 sum of H products near 1, whatever the dtype of the inputs: an ulp
# of its size a term, at temperatures down to 0.3.
HEAD_LOGIT_ROUNDING = 1e-6

# Gradients of hidden, weight and bias sum products of both signs over the vocabulary or the tokens:
# relative to the largest element.
HEAD_GRADIENT = 3e-5


def head_gradient(weight: torch.Tensor) -> float:
    """HEAD_GRADIENT of this weight. Where products are of bfloat16 or float16, on a GPU and on a
    CPU that has the instruction, every gradient of a logit is rounded to it for them."""
    low = weight.dtype != torch.float32 and (weight.is_cuda or own_product(weight) is not None)
    return HEAD_GRADIENT + (ROUNDING[weight.dtype] if low else 0.0)


def assert_same_product(actual: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    """Results of one product, or of what follows from it: of the same bits on a CPU; on a GPU BLAS
    may choose another kernel for other strides or another shape, which adds in another order."""
    if actual.is_cuda:
        largest = expected.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
        absolute = HEAD_GRADIENT * max(largest, 1.0)
        assert_close(actual, expected, relative=0.0, absolute=absolute, what=what)
    else:
        assert torch.equal(actual.nan_to_num(7e7), expected.nan_to_num(7e7)), what


# Recursions of at most a few hundred float32 steps with gamma lambda <= 1: errors add up linearly.
SCAN_RELATIVE = 2e-5
SCAN_ABSOLUTE = 2e-5

# Means of up to 10^4 elements, in parts: a few ulp of the largest; times mean / spread, which tests
# pass in, where the deviations have lost the digits that the mean takes.
WHITEN_RELATIVE = 1e-5
WHITEN_ABSOLUTE = 5e-6

# A step of AdamW: a few roundings of the weight, a step; tests add what the step itself is off.
ADAMW_RELATIVE = 3e-7
ADAMW_ABSOLUTE = 1e-9

# What a step of AdamW is off, in units of lr: m / sqrt(v) is near 1 and known to a few ulp, of its
# terms where they cancel.
STEP_RELATIVE = 1e-5

# Sums over tokens of terms of both signs: relative to the sum of magnitudes, which tests pass in.
SUM_RELATIVE = 2e-5

# exp, tanh and log1p in float32 are good to a few ulp each: relative to the sum of magnitudes of
# what is added, which tests pass in.
SQUASHED_RELATIVE = 5e-7

# Learner's logprobs in float32, packed against alone: matrix products and attention of other shapes
# add in another order. 2.9e-6 nats was the most of five small models on a CPU.
LEARNER_COMPOSITION = 1e-5

# Gradient of a model in float32 against the same formula through autograd, relative to the largest
# element.
CORRECTION_GRADIENT = 1e-5


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    relative: float,
    absolute: float,
    what: str,
) -> None:
    """|actual - expected| <= absolute + (relative + rounding of actual's dtype) |expected|; NaN and
    infinities must be the same on both sides."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, {tuple(expected.shape)}"
    relative += ROUNDING[actual.dtype]
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    torch.testing.assert_close(
        actual[~finite],
        expected[~finite],
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )
    excess = (actual - expected).abs() - absolute - relative * expected.abs()
    excess = torch.where(finite, excess, -1.0).nan_to_num(torch.inf)
    if excess.numel() and excess.max() > 0:
        at = int(excess.argmax())
        raise AssertionError(
            f"{what}: element {at} is {actual.flatten()[at]:.9g}, float64 says "
            f"{expected.flatten()[at]:.9g} ({int((excess > 0).sum())} of {excess.numel()} are off)"
        )


# Drop-ins: beyond the error that the library's own function has in its dtype, roundings of the
# largest element, since sums are added in another order.
DROP_IN_ULPS = 16

# Twenty steps of a trainer in float32 with two orders of the same sums: each step moves weights by
# what AdamW makes of gradients a few ulp apart. Relative to the logged figure, or to 1. 7.5e-7 was
# the most of all figures, of the KL, on a CPU.
TRAINER_LOSS = 1e-5
