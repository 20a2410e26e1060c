"""Estimators of KL(policy || reference), or of the reverse, token by token, from samples of the
policy.

With d = ref - logp:

    k1 = -d        k2 = d^2 / 2        k3 = e^d - 1 - d
    reverse_k3 = d e^d - (e^d - 1)                           of KL(reference || policy)

and the value clamped to [-limit, limit]. Backward, 0 where the value is clamped (at the bound it is
not) or infinite:

    d k1 / d logp = 1        d k2 / d logp = -d        d k3 / d logp = 1 - e^d
    d reverse_k3 / d logp = -d e^d

or, with gradient "k2", -d times the weight of the token whatever the estimator, without the clamp:
the expectation of that is the gradient of the KL. d / d ref = -d / d logp.

Source: http://joschu.net/blog/kl-approx.html.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.approx_kl import ApproxKlArguments, ApproxKlBackwardArguments
from warpo.kernels._checks import (
    FLOATS,
    as_rows,
    check_mask,
    check_no_grad,
    check_number,
    check_tensor,
)
from warpo.kernels._registration import Operator
from warpo.kernels._sequences import empty_float32
from warpo.kernels.objectives import KL_ESTIMATORS, KL_GRADIENTS

_CODES = {name: 1 + code for code, name in enumerate(KL_ESTIMATORS)}


class ApproxKlInputs(NamedTuple):
    logprobs: Tensor
    ref_logprobs: Tensor
    weight: Tensor | None
    mask: Tensor | None
    estimator: int
    straight_through: bool
    limit: float
    backend: str


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
    """An estimate of KL(policy || reference), or of the reverse, at each token of the policy.

    Of tokens that the reference drew, pass the two the other way round: the estimates are then of
    KL(reference || policy), and the reverse of KL(policy || reference).

    Args:
        logprobs: of the policy, float32 | bfloat16 | float16, any strides of up to two dimensions;
            more must merge into rows. Differentiable.
        ref_logprobs: like logprobs: of the reference. Differentiable.
        estimator: "k1" | "k2" | "k3" of KL(policy || reference), or "reverse_k3" of
            KL(reference || policy).
        gradient: of the "estimator", or of "k2" whatever the estimator: weight (logprobs -
            ref_logprobs)^2 / 2, where the value is clamped too. Not of "reverse_k3".
        limit: > 0: the value is clamped to [-limit, limit], with gradient 0 where it is.
        weight: like logprobs: of a token in the gradient "k2" and in that alone, such as an
            importance weight. A constant; None: 1.
        mask: like logprobs, bool | uint8. Masked slots are never read (they may hold NaN); result
            and gradient are 0 there.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        float32, of the shape of logprobs, differentiable with respect to logprobs and ref_logprobs.
            k3 and reverse_k3 of a difference above 88 are inf before the clamp; the gradient is 0
            there too.

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
            logprobs.float(),
            ref_logprobs.float(),
            estimator,
            gradient=gradient,
            limit=limit,
            weight=None if weight is None else weight.float(),
            mask=mask,
        )

    inputs = ApproxKlInputs(
        logprobs=_as_rows("logprobs", logprobs),
        ref_logprobs=_as_rows("ref_logprobs", ref_logprobs),
        weight=None if weight is None else _as_rows("weight", weight),
        mask=None if mask is None else _as_rows("mask", mask),
        estimator=_CODES[estimator],
        straight_through=gradient == "k2",
        limit=float(limit),
        backend=name,
    )
    kl = _operator(inputs)
    return kl if kl.shape == logprobs.shape else kl.view(logprobs.shape)


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
    if estimator == "reverse_k3" and gradient == "k2":
        raise ValueError(
            "gradient 'k2' is that of the other direction than 'reverse_k3': set it to 'estimator'"
        )
    if weight is not None and gradient != "k2":
        raise ValueError(
            "weight is of gradient 'k2' alone: set gradient to 'k2', or weight to None"
        )
    check_number("limit", limit)
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit}")


def _as_rows(name: str, tensor: Tensor) -> Tensor:
    """One or two dimensions; the former is one row for the kernels."""
    return tensor if tensor.dim() in (1, 2) else as_rows(name, tensor)


def _rows(logprobs: Tensor) -> tuple[int, int]:
    shape = logprobs.shape
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


class _BackwardInputs(NamedTuple):
    logprobs: Tensor
    ref_logprobs: Tensor
    weight: Tensor | None
    mask: Tensor | None
    grad_kl: Tensor
    of_logprobs: bool
    of_ref: bool
    estimator: int
    straight_through: bool
    limit: float
    backend: str


def _forward(inputs: ApproxKlInputs) -> Tensor:
    kl = _allocate(inputs)
    rows, columns = _rows(kl)
    arguments = ApproxKlArguments(
        rows=rows,
        columns=columns,
        logprobs=inputs.logprobs,
        ref_logprobs=inputs.ref_logprobs,
        mask=inputs.mask,
        estimator=inputs.estimator,
        limit=inputs.limit,
        kl=kl,
    )
    dispatch.load(inputs.backend).approx_kl_forward(arguments)
    return kl


def _allocate(inputs: ApproxKlInputs) -> Tensor:
    return empty_float32(inputs.logprobs)


def _backward(inputs: _BackwardInputs) -> tuple[Tensor, Tensor]:
    """Those gradients that are wanted, the others empty."""
    grad_logprobs, grad_ref = _allocate_gradients(inputs)
    rows, columns = _rows(inputs.logprobs)
    arguments = ApproxKlBackwardArguments(
        rows=rows,
        columns=columns,
        logprobs=inputs.logprobs,
        ref_logprobs=inputs.ref_logprobs,
        weight=inputs.weight,
        mask=inputs.mask,
        estimator=inputs.estimator,
        straight_through=inputs.straight_through,
        limit=inputs.limit,
        grad_kl=inputs.grad_kl,
        grad_logprobs=grad_logprobs if inputs.of_logprobs else None,
        grad_ref=grad_ref if inputs.of_ref else None,
    )
    dispatch.load(inputs.backend).approx_kl_backward(arguments)
    return grad_logprobs, grad_ref


def _allocate_gradients(inputs: _BackwardInputs) -> tuple[Tensor, Tensor]:
    return (
        _empty_like(inputs.logprobs, inputs.of_logprobs),
        _empty_like(inputs.ref_logprobs, inputs.of_ref),
    )


def _empty_like(x: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_backward_operator = Operator("approx_kl_backward", _backward, _allocate_gradients)


def _save(ctx: Any, inputs: ApproxKlInputs, output: Tensor) -> None:
    ctx.estimator, ctx.straight_through = inputs.estimator, inputs.straight_through
    ctx.limit, ctx.backend = inputs.limit, inputs.backend
    ctx.save_for_backward(inputs.logprobs, inputs.ref_logprobs, inputs.weight, inputs.mask)


def _differentiate(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logprobs, ref_logprobs, weight, mask = ctx.saved_tensors
    of_logprobs, of_ref, *_ = ctx.needs_input_grad
    inputs = _BackwardInputs(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        weight=weight,
        mask=mask,
        grad_kl=grad_kl,
        of_logprobs=of_logprobs,
        of_ref=of_ref,
        estimator=ctx.estimator,
        straight_through=ctx.straight_through,
        limit=ctx.limit,
        backend=ctx.backend,
    )
    grad_logprobs, grad_ref = _backward_operator(inputs)
    return (grad_logprobs if of_logprobs else None, grad_ref if of_ref else None)


_operator = Operator("approx_kl", _forward, _allocate, _save, _differentiate, differentiable=2)
