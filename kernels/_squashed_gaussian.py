"""Tanh-squashed Gaussian actions and their logprobs in one pass, as soft actor-critic samples them.

With s = clamp(log_std, log_std_min, log_std_max), for each component of an action:

    u      = mean + exp(s) noise        a = tanh(u)
    log pi = sum of -noise^2 / 2 - s - log(2 pi) / 2 - log(1 - tanh(u)^2)

where log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)). Backward, with the gradients G of an
action and g of its logprob:

    du = G (1 - a^2) + 2 g a        d mean = du        d log_std = du exp(s) noise - g

and d log_std = 0 outside the clamp, whose bounds are inside.

Source: https://arxiv.org/abs/1801.01290 appendix C eq. 21; the reparameterised policy gradient,
eq. 13.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.squashed_gaussian import (
    SquashedGaussianArguments,
    SquashedGaussianBackwardArguments,
)
from warpo.kernels._checks import FLOATS, check_no_grad, check_number, check_tensor
from warpo.kernels._registration import Operator


class SquashedGaussianInputs(NamedTuple):
    mean: Tensor
    log_std: Tensor
    noise: Tensor
    log_std_min: float
    log_std_max: float
    backend: str


class SquashedGaussian(NamedTuple):
    actions: Tensor
    logprobs: Tensor


def squashed_gaussian(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    *,
    log_std_min: float = -20.0,
    log_std_max: float = 2.0,
    backend: str | None = None,
) -> SquashedGaussian:
    """Actions tanh(mean + exp(log_std) noise) and the logprobs of having taken them.

    Args:
        mean: (B, A) float32 | bfloat16 | float16, any strides. Differentiable.
        log_std: like mean. Differentiable; the gradient is 0 where it is clamped.
        noise: like mean, drawn from the standard normal distribution. A constant. Zeros give the
            actions of the mode before squashing.
        log_std_min, log_std_max: log_std is clamped to these.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        actions: (B, A) float32 in [-1, 1].
        logprobs: (B,) float32. Finite for finite arguments, also where an action rounds to 1.
            Both are differentiable with respect to mean and log_std.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or noise requires grad.

    Source: https://arxiv.org/abs/1801.01290 appendix C eq. 21. Memory beyond arguments and results:
    none; backward reads the three arguments again.
    """
    check_tensor("mean", mean, FLOATS)
    if mean.dim() != 2:
        raise ValueError(f"mean must be (B, A), got {tuple(mean.shape)}")
    check_tensor("log_std", log_std, FLOATS, mean.shape, mean)
    check_tensor("noise", noise, FLOATS, mean.shape, mean)
    check_no_grad("noise", noise)
    check_number("log_std_min", log_std_min)
    check_number("log_std_max", log_std_max)
    if not log_std_min <= log_std_max:
        raise ValueError(f"log_std_min must be <= log_std_max, got {log_std_min} and {log_std_max}")
    name = dispatch.choose(mean, backend)
    if name == "reference":
        bounds = {"log_std_min": log_std_min, "log_std_max": log_std_max}
        return SquashedGaussian(
            *reference.squashed_gaussian(mean.float(), log_std.float(), noise.float(), **bounds)
        )
    inputs = SquashedGaussianInputs(
        mean=mean,
        log_std=log_std,
        noise=noise,
        log_std_min=float(log_std_min),
        log_std_max=float(log_std_max),
        backend=name,
    )
    return SquashedGaussian(*_operator(inputs))


class _BackwardInputs(NamedTuple):
    mean: Tensor
    log_std: Tensor
    noise: Tensor
    grad_actions: Tensor | None
    grad_logprobs: Tensor | None
    log_std_min: float
    log_std_max: float
    backend: str


def _forward(inputs: SquashedGaussianInputs) -> tuple[Tensor, Tensor]:
    actions, logprobs = _allocate(inputs)
    arguments = _arguments(inputs, actions, logprobs)
    dispatch.load(inputs.backend).squashed_gaussian_forward(arguments)
    return actions, logprobs


def _arguments(
    inputs: SquashedGaussianInputs | _BackwardInputs,
    actions: Tensor | None,
    logprobs: Tensor | None,
) -> SquashedGaussianArguments:
    rows, columns = inputs.mean.shape
    return SquashedGaussianArguments(
        rows=rows,
        columns=columns,
        mean=inputs.mean,
        log_std=inputs.log_std,
        noise=inputs.noise,
        log_std_min=inputs.log_std_min,
        log_std_max=inputs.log_std_max,
        actions=actions,
        logprobs=logprobs,
    )


def _allocate(inputs: SquashedGaussianInputs) -> tuple[Tensor, Tensor]:
    mean = inputs.mean
    return _empty(mean), mean.new_empty(mean.shape[:1], dtype=torch.float32)


def _empty(mean: Tensor) -> Tensor:
    return mean.new_empty(mean.shape, dtype=torch.float32)


def _backward(inputs: _BackwardInputs) -> tuple[Tensor, Tensor]:
    grad_mean, grad_log_std = _allocate_gradients(inputs)
    arguments = SquashedGaussianBackwardArguments(
        forward=_arguments(inputs, None, None),
        grad_actions=inputs.grad_actions,
        grad_logprobs=inputs.grad_logprobs,
        grad_mean=grad_mean,
        grad_log_std=grad_log_std,
    )
    dispatch.load(inputs.backend).squashed_gaussian_backward(arguments)
    return grad_mean, grad_log_std


def _allocate_gradients(inputs: _BackwardInputs) -> tuple[Tensor, Tensor]:
    return _empty(inputs.mean), _empty(inputs.mean)


_backward_operator = Operator("squashed_gaussian_backward", _backward, _allocate_gradients)


def _save(ctx: Any, inputs: SquashedGaussianInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.bounds, ctx.backend = (inputs.log_std_min, inputs.log_std_max), inputs.backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs.mean, inputs.log_std, inputs.noise)


def _differentiate(
    ctx: Any, grad_actions: Tensor | None, grad_logprobs: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if grad_actions is None and grad_logprobs is None:
        return (None, None)
    mean, log_std, noise = ctx.saved_tensors
    inputs = _BackwardInputs(
        mean=mean,
        log_std=log_std,
        noise=noise,
        grad_actions=grad_actions,
        grad_logprobs=grad_logprobs,
        log_std_min=ctx.bounds[0],
        log_std_max=ctx.bounds[1],
        backend=ctx.backend,
    )
    grad_mean, grad_log_std = _backward_operator(inputs)
    return (grad_mean.to(mean.dtype), grad_log_std.to(log_std.dtype))


_operator = Operator(
    "squashed_gaussian", _forward, _allocate, _save, _differentiate, differentiable=2
)
