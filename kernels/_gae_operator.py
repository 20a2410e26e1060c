"""The operator behind `gae`, `discounted_returns` and `lambda_returns`, and its adjoint.

    A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}            returns_t = A_t + V_t

It is linear in rewards and values, so the backward pass, the adjoint of the same recursion walked
forward in time, reads neither.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._arguments.gae import GaeBackwardArguments, ScanArguments
from warpo.kernels._registration import Operator
from warpo.kernels._scan import (
    NUM_TENSORS,
    empty_like,
    gae_arguments,
    is_empty,
    nothing_like,
)


class GaeInputs(NamedTuple):
    rewards: Tensor
    values: Tensor | None
    last_values: Tensor | None
    final_values: Tensor | None
    steps: ScanArguments
    returns_only: bool
    backend: str


class GaeBackwardInputs(NamedTuple):
    """rewards: for their shape and layout."""

    rewards: Tensor
    steps: ScanArguments
    has_values: bool
    has_final_values: bool
    grad_advantages: Tensor | None
    grad_returns: Tensor | None
    backend: str


def _forward(inputs: GaeInputs) -> tuple[Tensor, Tensor]:
    advantages, returns = _allocate(inputs)
    rewards, steps = inputs.rewards, inputs.steps
    if not is_empty(rewards, steps.cu_seqlens, advantages, returns):
        arguments = gae_arguments(
            rewards,
            steps,
            rewards=rewards,
            values=inputs.values,
            last_values=inputs.last_values,
            final_values=inputs.final_values,
            advantages=None if inputs.returns_only else advantages,
            returns=returns,
        )
        dispatch.load(inputs.backend).gae_forward(arguments)
    return advantages, returns


def _allocate(inputs: GaeInputs) -> tuple[Tensor, Tensor]:
    rewards = inputs.rewards
    advantages = nothing_like(rewards) if inputs.returns_only else empty_like(rewards)
    return advantages, empty_like(rewards)


def _backward(inputs: GaeBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _allocate_gradients(inputs)
    rewards, steps = inputs.rewards, inputs.steps
    if not is_empty(rewards, steps.cu_seqlens, *gradients):
        of_rewards, of_values, of_last, of_final = gradients
        final = of_final if inputs.has_final_values else None
        arguments = GaeBackwardArguments(
            forward=gae_arguments(rewards, steps, final_values=final),
            grad_advantages=inputs.grad_advantages,
            grad_returns=inputs.grad_returns,
            grad_rewards=of_rewards,
            grad_values=of_values if inputs.has_values else None,
            grad_last_values=of_last,
            grad_final_values=final,
        )
        dispatch.load(inputs.backend).gae_backward(arguments)
    return gradients


def _allocate_gradients(inputs: GaeBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rewards, values, last_values and final_values; empty for those not given."""
    rewards, cu_seqlens = inputs.rewards, inputs.steps.cu_seqlens
    rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        empty_like(rewards),
        empty_like(rewards) if inputs.has_values else nothing_like(rewards),
        rewards.new_zeros((rows, 1), dtype=torch.float32),
        empty_like(rewards) if inputs.has_final_values else nothing_like(rewards),
    )


_backward_operator = Operator("gae_backward", _backward, _allocate_gradients)


def _save(ctx: Any, inputs: GaeInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.returns_only, ctx.backend = inputs.returns_only, inputs.backend
    given = (inputs.rewards, inputs.values, inputs.last_values, inputs.final_values)
    ctx.dtypes = [None if x is None else x.dtype for x in given]
    ctx.numbers = inputs.steps[NUM_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs.rewards, *inputs.steps[:NUM_TENSORS])


def _differentiate(
    ctx: Any, grad_advantages: Tensor | None, grad_returns: Tensor | None
) -> tuple[Tensor | None, ...]:
    if ctx.returns_only:
        grad_advantages = None  # of the empty tensor that stands for them
    if grad_advantages is None and grad_returns is None:
        return (None, None, None, None)
    rewards, *tensors = ctx.saved_tensors
    _, of_values, _, of_final = ctx.dtypes
    inputs = GaeBackwardInputs(
        rewards=rewards,
        steps=ScanArguments(*tensors, *ctx.numbers),
        has_values=of_values is not None,
        has_final_values=of_final is not None,
        grad_advantages=grad_advantages,
        grad_returns=grad_returns,
        backend=ctx.backend,
    )
    cast = [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(_backward_operator(inputs), ctx.dtypes, strict=True)
    ]
    return tuple(cast)


gae_operator = Operator("gae", _forward, _allocate, _save, _differentiate, differentiable=4)
