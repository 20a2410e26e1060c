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
from warpo.kernels.checks import FLOATS, check_no_grad, check_number, check_tensor
from warpo.kernels.positional import PositionalOperator as Operator


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
        return SquashedGaussian(
            *reference.squashed_gaussian(
                mean.float(), log_std.float(), noise.float(),
                log_std_min=log_std_min, log_std_max=log_std_max,
            )
        )  # fmt: skip
    return SquashedGaussian(
        *_operator(mean, log_std, noise, float(log_std_min), float(log_std_max), name)
    )


def _forward(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    log_std_min: float,
    log_std_max: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    actions, logprobs = _allocate(mean)
    dispatch.load_positional(backend).squashed_gaussian_forward(
        *mean.shape, mean, log_std, noise, log_std_min, log_std_max, actions, logprobs
    )
    return actions, logprobs


def _allocate(mean: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(mean), mean.new_empty(mean.shape[:1], dtype=torch.float32)


def _empty(mean: Tensor) -> Tensor:
    return mean.new_empty(mean.shape, dtype=torch.float32)


def _fake_forward(mean, *_):
    return _allocate(mean)


def _backward(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    grad_actions: Tensor | None,
    grad_logprobs: Tensor | None,
    log_std_min: float,
    log_std_max: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_mean, grad_log_std = _empty(mean), _empty(mean)
    dispatch.load_positional(backend).squashed_gaussian_backward(
        *mean.shape, mean, log_std, noise, log_std_min, log_std_max, None, None,
        grad_actions, grad_logprobs, grad_mean, grad_log_std,
    )  # fmt: skip
    return grad_mean, grad_log_std


def _fake_backward(mean, *_):
    return _empty(mean), _empty(mean)


_backward_operator = Operator("squashed_gaussian_backward", _backward, _fake_backward)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = inputs[3:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])


def _differentiate(ctx: Any, grad_actions: Tensor | None, grad_logprobs: Tensor | None) -> Any:
    if grad_actions is None and grad_logprobs is None:
        return (None,) * 6
    mean, log_std, noise = ctx.saved_tensors
    grad_mean, grad_log_std = _backward_operator(
        mean, log_std, noise, grad_actions, grad_logprobs, *ctx.options
    )
    return (grad_mean.to(mean.dtype), grad_log_std.to(log_std.dtype), *(None,) * 4)


_operator = Operator(
    "squashed_gaussian", _forward, _fake_forward, _save, _differentiate, differentiable=2
)
