"""The operator behind `gae`, `discounted_returns` and `lambda_returns`, and its adjoint.

    A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}            returns_t = A_t + V_t

It is linear in rewards and values, so the backward pass, the adjoint of the same recursion walked
forward in time, reads neither.
"""

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels.positional import PositionalOperator as Operator
from warpo.kernels.scan import empty_like, is_empty, nothing_like, sizes


def _forward(
    rewards: Tensor,
    values: Tensor | None,
    last_values: Tensor | None,
    final_values: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    gae_lambda: float,
    mask_mode: int,
    starts_at_t: bool,
    returns_only: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _allocate(rewards, returns_only)
    if not is_empty(rewards, cu_seqlens, advantages, returns):
        dispatch.load_positional(backend).gae_forward(
            *sizes(rewards, cu_seqlens), cu_seqlens, rewards, None, values, last_values,
            final_values, mask, terminated, truncated, last_terminated, last_truncated,
            gamma, gae_lambda, mask_mode, starts_at_t,
            None if returns_only else advantages, returns,
        )  # fmt: skip
    return advantages, returns


def _allocate(rewards: Tensor, returns_only: bool) -> tuple[Tensor, Tensor]:
    return nothing_like(rewards) if returns_only else empty_like(rewards), empty_like(rewards)


def _fake_forward(rewards, *others):
    return _allocate(rewards, others[13])


def _backward(
    rewards: Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    gae_lambda: float,
    mask_mode: int,
    starts_at_t: bool,
    has_values: bool,
    has_final_values: bool,
    grad_advantages: Tensor | None,
    grad_returns: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _allocate_gradients(rewards, cu_seqlens, has_values, has_final_values)
    if not is_empty(rewards, cu_seqlens, *gradients):
        of_rewards, of_values, of_last, of_final = gradients
        final = of_final if has_final_values else None
        dispatch.load_positional(backend).gae_backward(
            *sizes(rewards, cu_seqlens), cu_seqlens, None, None, None, None, final, mask,
            terminated, truncated, last_terminated, last_truncated,
            gamma, gae_lambda, mask_mode, starts_at_t, None, None,
            grad_advantages, grad_returns,
            of_rewards, of_values if has_values else None, of_last, final,
        )  # fmt: skip
    return gradients


def _allocate_gradients(
    rewards: Tensor, cu_seqlens: Tensor | None, has_values: bool, has_final_values: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rewards, values, last_values and final_values; empty for those not given."""
    rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        empty_like(rewards),
        empty_like(rewards) if has_values else nothing_like(rewards),
        rewards.new_zeros((rows, 1), dtype=torch.float32),
        empty_like(rewards) if has_final_values else nothing_like(rewards),
    )


def _fake_backward(rewards, *others):
    return _allocate_gradients(rewards, others[5], *others[10:12])


_backward_operator = Operator("gae_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:
    ctx.options = inputs[10:14]
    ctx.returns_only, ctx.backend = inputs[14:]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:4]]
    ctx.set_materialize_grads(False)
    # rewards are saved for their shape and layout
    ctx.save_for_backward(inputs[0], *inputs[4:10])


def _differentiate(ctx, grad_advantages, grad_returns):
    if ctx.returns_only:
        grad_advantages = None  # of the empty tensor that stands for them
    if grad_advantages is None and grad_returns is None:
        return (None,) * 16
    has_values, has_final_values = ctx.dtypes[1] is not None, ctx.dtypes[3] is not None
    gradients = _backward_operator(
        *ctx.saved_tensors, *ctx.options, has_values, has_final_values,
        grad_advantages, grad_returns, ctx.backend,
    )  # fmt: skip
    cast = [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
    return (*cast, *(None,) * 12)


gae_operator = Operator("gae", _forward, _fake_forward, _save, _differentiate)
