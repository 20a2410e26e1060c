"""Estimators of KL(policy || reference), token by token, from samples of the policy.

With d = ref - logp:

    k1 = -d        k2 = d^2 / 2        k3 = e^d - 1 - d

and the value clamped to [-limit, limit]. Backward, 0 where the value is clamped (at the bound it is
not) or infinite:

    d k1 / d logp = 1        d k2 / d logp = -d        d k3 / d logp = 1 - e^d

or, with gradient "k2", -d times the weight of the token whatever the estimator, without the clamp:
the expectation of that is the gradient of the KL. d / d ref = -d / d logp.

Source: http://joschu.net/blog/kl-approx.html.
"""

import math
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels.checks import (
    FLOATS,
    as_rows,
    check_mask,
    check_no_grad,
    check_number,
    check_tensor,
)
from warpo.kernels.objectives import KL_ESTIMATORS, KL_GRADIENTS
from warpo.kernels.positional import PositionalOperator as Operator
from warpo.kernels.sequences import empty_float32

_CODES = {name: 1 + code for code, name in enumerate(KL_ESTIMATORS)}


def approx_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str = "k3",
    *,
    gradient: str = "estimator",
    limit: float = math.inf,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy sampled.

    Args:
        logprobs: of the policy, float32 | bfloat16 | float16, any strides of up to two dimensions;
            more must merge into rows. Differentiable.
        ref_logprobs: like logprobs: of the reference. Differentiable.
        estimator: "k1" | "k2" | "k3".
        gradient: of the "estimator", or of "k2" whatever the estimator: weight (logprobs -
            ref_logprobs)^2 / 2, where the value is clamped too.
        limit: > 0: the value is clamped to [-limit, limit], with gradient 0 where it is.
        weight: like logprobs: of a token in the gradient "k2" and in that alone, such as an
            importance weight. A constant; None: 1.
        mask: like logprobs, bool | uint8. Masked slots are never read (they may hold NaN); result
            and gradient are 0 there.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        float32, of the shape of logprobs, differentiable with respect to logprobs and ref_logprobs.
        k3 of a difference above 88 is inf before the clamp; the gradient is 0 there too.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or weight comes with gradient
            "estimator".

    Source: http://joschu.net/blog/kl-approx.html. Memory beyond arguments and results: none;
    backward reads the arguments again.
    """
    _check(logprobs, ref_logprobs, weight, mask)
    _check_options(estimator, gradient, limit, weight)
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        return reference.approx_kl(
            logprobs.float(), ref_logprobs.float(), estimator, gradient=gradient, limit=limit,
            weight=None if weight is None else weight.float(), mask=mask,
        )  # fmt: skip
    options = (_CODES[estimator], gradient == "k2", float(limit), name)
    if logprobs.dim() in (1, 2):
        return _operator(logprobs, ref_logprobs, weight, mask, *options)
    return _operator(
        as_rows("logprobs", logprobs),
        as_rows("ref_logprobs", ref_logprobs),
        None if weight is None else as_rows("weight", weight),
        None if mask is None else as_rows("mask", mask),
        *options,
    ).view(logprobs.shape)


def _check(
    logprobs: Tensor, ref_logprobs: Tensor, weight: Tensor | None, mask: Tensor | None
) -> None:
    check_tensor("logprobs", logprobs, FLOATS)
    check_tensor("ref_logprobs", ref_logprobs, FLOATS, logprobs.shape, logprobs)
    if weight is not None:
        check_tensor("weight", weight, FLOATS, logprobs.shape, logprobs)
        check_no_grad("weight", weight)
    check_mask("mask", mask, logprobs.shape, logprobs)


def _check_options(estimator: str, gradient: str, limit: float, weight: Tensor | None) -> None:
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(KL_ESTIMATORS)}; got {estimator!r}")
    if gradient not in KL_GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(KL_GRADIENTS)}; got {gradient!r}")
    if weight is not None and gradient != "k2":
        raise ValueError(
            "weight is of gradient 'k2' alone: set gradient to 'k2', or weight to None"
        )
    check_number("limit", limit)
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit}")


def _rows(logprobs: Tensor) -> tuple[int, int]:
    shape = logprobs.shape
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


def _forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    estimator: int,
    straight_through: bool,
    limit: float,
    backend: str,
) -> Tensor:
    kl = empty_float32(logprobs)
    dispatch.load_positional(backend).approx_kl_forward(
        *_rows(logprobs), logprobs, ref_logprobs, mask, estimator, limit, kl
    )
    return kl


def _fake_forward(logprobs, *_):
    return empty_float32(logprobs)


def _backward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    grad_kl: Tensor,
    of_logprobs: bool,
    of_ref: bool,
    estimator: int,
    straight_through: bool,
    limit: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Those gradients that are wanted, the others empty."""
    grad_logprobs, grad_ref = _allocate(logprobs, ref_logprobs, of_logprobs, of_ref)
    dispatch.load_positional(backend).approx_kl_backward(
        *_rows(logprobs), logprobs, ref_logprobs, weight, mask, estimator, straight_through, limit,
        grad_kl, grad_logprobs if of_logprobs else None, grad_ref if of_ref else None,
    )  # fmt: skip
    return grad_logprobs, grad_ref


def _allocate(
    logprobs: Tensor, ref_logprobs: Tensor, of_logprobs: bool, of_ref: bool
) -> tuple[Tensor, Tensor]:
    return (
        _empty_like(logprobs, of_logprobs),
        _empty_like(ref_logprobs, of_ref),
    )


def _empty_like(x: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(logprobs, ref_logprobs, *arguments):
    return _allocate(logprobs, ref_logprobs, *arguments[3:5])


_backward_operator = Operator("approx_kl_backward", _backward, _fake_backward)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, grad_kl: Tensor) -> Any:
    of_logprobs, of_ref, *_ = ctx.needs_input_grad
    grad_logprobs, grad_ref = _backward_operator(
        *ctx.saved_tensors, grad_kl, of_logprobs, of_ref, *ctx.options
    )
    gradients = (grad_logprobs if of_logprobs else None, grad_ref if of_ref else None)
    return (*gradients, None, None, None, None, None, None)


_operator = Operator("approx_kl", _forward, _fake_forward, _save, _differentiate, differentiable=2)
