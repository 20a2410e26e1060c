"""Generalised advantage estimation in one reverse scan, over tokens or over environment steps.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}            returns_t = A_t + V_t

Where an episode ends at t the scan is cut: `terminated` drops V_{t+1} and A_{t+1}, `truncated`
replaces V_{t+1} by the value of the final observation and drops A_{t+1}. The backward pass is the
adjoint of the same recursion, walked forward in time.

Source: https://arxiv.org/abs/1506.02438 eq. 16; the scan as affine maps: Blelloch, "Prefix sums and
their applications", section 1.4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels.checks import FLOATS, check_mask, check_tensor
from warpo.kernels.registration import Operator

MASK_MODES = ("carry", "zero")
DONE_CONVENTIONS = ("ends_at_t", "starts_at_t")


class Gae(NamedTuple):
    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
    done_convention: str = "ends_at_t",
    last_terminated: Tensor | None = None,
    last_truncated: Tensor | None = None,
    time_dim: int = -1,
    backend: str | None = None,
) -> Gae:
    """Advantages and returns of rewards `[B, T]` (tokens), `[N, T]` or `[T, N]` (environment
    steps).

    Args:
        rewards: 2-D float32 | bfloat16 | float16, any strides. Differentiable, as are all values.
        values: like rewards; values[t] belongs to the state before step t.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1].
        mask: like rewards, bool | uint8. Masked slots are never read (they may hold NaN); both
            results are 0 there.
        mask_mode: what a masked step does to the steps before it. "carry": V and A of the next
            valid step pass through it. "zero": it counts as a step with reward 0 and value 0, and
            decays the trace.
        terminated: like rewards, bool | uint8: the episode ended for good, the next value is 0.
        truncated: like rewards, bool | uint8: the episode was cut, the next value is final_values.
        last_values: values after the last step, one a sequence or environment; 0 if not given, as
            after the last token of a response.
        final_values: like rewards: value of the final observation of step t, read where truncated
            only. Required with truncated.
        done_convention: "ends_at_t": a flag at t says that step t ended an episode. "starts_at_t":
            it says that t is the first step of a new one, so that step t - 1 ended; the flags after
            the last step are last_terminated and last_truncated (none if not given).
        last_terminated: one bool | uint8 a sequence or environment; with "starts_at_t" only.
        last_truncated: likewise.
        time_dim: the dimension of time, -1 (or 1) for [B, T] and [N, T], 0 for [T, N]. No copy is
            made.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        advantages, returns: float32, of the shape of rewards.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: https://arxiv.org/abs/1506.02438 eq. 16. Memory beyond arguments and results: none.
    """
    _check(rewards, values, gamma, gae_lambda, mask, mask_mode, done_convention, time_dim)
    _check_ends(rewards, terminated, truncated, last_values, final_values, time_dim)
    _check_last_flags(rewards, last_terminated, last_truncated, done_convention, time_dim)
    name = dispatch.choose(rewards, backend)
    if name == "reference":
        result = reference.gae(
            rewards.float(), values.float(), gamma, gae_lambda, mask=mask, mask_mode=mask_mode,
            terminated=terminated, truncated=truncated,
            last_values=None if last_values is None else last_values.float(),
            final_values=None if final_values is None else final_values.float(),
            done_convention=done_convention, last_terminated=last_terminated,
            last_truncated=last_truncated, time_dim=time_dim,
        )  # fmt: skip
        return Gae(*result)

    if time_dim == 0:
        rewards, values = rewards.t(), values.t()
        final_values, mask, terminated, truncated = (
            None if tensor is None else tensor.t()
            for tensor in (final_values, mask, terminated, truncated)
        )
    last_values, last_terminated, last_truncated = (
        None if tensor is None else tensor[:, None]
        for tensor in (last_values, last_terminated, last_truncated)
    )
    advantages, returns = _operator(
        rewards, values, last_values, final_values, mask,
        terminated, truncated, last_terminated, last_truncated,
        gamma, gae_lambda, mask_mode == "carry", done_convention == "starts_at_t", name,
    )  # fmt: skip
    return Gae(advantages.t(), returns.t()) if time_dim == 0 else Gae(advantages, returns)


def _check(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None,
    mask_mode: str,
    done_convention: str,
    time_dim: int,
) -> None:
    check_tensor("rewards", rewards, FLOATS)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be 2-D, [B, T] or [T, N], got {tuple(rewards.shape)}")
    check_tensor("values", values, FLOATS, rewards.shape, rewards)
    check_mask("mask", mask, rewards.shape, rewards)
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode must be one of {', '.join(MASK_MODES)}; got {mask_mode!r}")
    if done_convention not in DONE_CONVENTIONS:
        raise ValueError(
            f"done_convention must be one of {', '.join(DONE_CONVENTIONS)}; got {done_convention!r}"
        )
    if time_dim not in (-1, 0, 1):
        raise ValueError(f"time_dim must be -1, 0 or 1, got {time_dim}")


def _check_ends(
    rewards: Tensor,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_values: Tensor | None,
    final_values: Tensor | None,
    time_dim: int,
) -> None:
    check_mask("terminated", terminated, rewards.shape, rewards)
    check_mask("truncated", truncated, rewards.shape, rewards)
    if (truncated is None) != (final_values is None):
        raise ValueError(
            "truncated and final_values go together: final_values[t] is the value of the "
            "observation that a truncated step t ended with"
        )
    if final_values is not None:
        check_tensor("final_values", final_values, FLOATS, rewards.shape, rewards)
    if last_values is not None:
        check_tensor("last_values", last_values, FLOATS, [rewards.shape[1 - time_dim % 2]], rewards)


def _check_last_flags(
    rewards: Tensor,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    done_convention: str,
    time_dim: int,
) -> None:
    for name, flags in (("last_terminated", last_terminated), ("last_truncated", last_truncated)):
        if flags is not None and done_convention != "starts_at_t":
            raise ValueError(f"{name} has a meaning with done_convention='starts_at_t' only")
        check_mask(name, flags, [rewards.shape[1 - time_dim % 2]], rewards)


def _forward(
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor | None,
    final_values: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    gamma: float,
    gae_lambda: float,
    carry: bool,
    starts_at_t: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _empty_like(rewards), _empty_like(rewards)
    if rewards.numel():
        dispatch.load(backend).gae_forward(
            *rewards.shape, rewards, values, last_values, final_values, mask, terminated, truncated,
            last_terminated, last_truncated, gamma, gae_lambda, carry, starts_at_t,
            advantages, returns,
        )  # fmt: skip
    return advantages, returns


def _empty_like(rewards: Tensor) -> Tensor:
    """Uninitialised float32 whose fast dimension is that of `rewards`, dense whatever its strides
    are.
    """
    if rewards.stride(0) <= rewards.stride(1):
        return rewards.new_empty(rewards.shape[::-1], dtype=torch.float32).t()
    return rewards.new_empty(rewards.shape, dtype=torch.float32)


def _fake_forward(rewards, *_):
    return _empty_like(rewards), _empty_like(rewards)


def _backward(
    rewards: Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    gamma: float,
    gae_lambda: float,
    carry: bool,
    starts_at_t: bool,
    grad_advantages: Tensor | None,
    grad_returns: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _allocate_gradients(rewards, truncated)
    if rewards.numel():
        final = None if truncated is None else gradients[3]
        dispatch.load(backend).gae_backward(
            *rewards.shape, None, None, None, final, mask, terminated, truncated,
            last_terminated, last_truncated, gamma, gae_lambda, carry, starts_at_t, None, None,
            grad_advantages, grad_returns, *gradients[:3], final,
        )  # fmt: skip
    return gradients


def _allocate_gradients(
    rewards: Tensor, truncated: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rewards, values, last_values and final_values (empty without truncation)."""
    last = rewards.new_zeros((rewards.shape[0], 1), dtype=torch.float32)
    final = rewards.new_empty(0, dtype=torch.float32) if truncated is None else _empty_like(rewards)
    return _empty_like(rewards), _empty_like(rewards), last, final


def _fake_backward(rewards, mask, terminated, truncated, *_):
    return _allocate_gradients(rewards, truncated)


_backward_operator = Operator("gae_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:
    rewards, values, last_values, final_values = inputs[:4]
    ctx.options = inputs[9:13]
    ctx.backend = inputs[13]
    ctx.dtypes = [
        None if x is None else x.dtype for x in (rewards, values, last_values, final_values)
    ]
    ctx.set_materialize_grads(False)
    # rewards are saved for their shape and layout: the recursion is linear, so no value is read
    # again
    ctx.save_for_backward(rewards, *inputs[4:9])


def _differentiate(ctx, grad_advantages, grad_returns):
    if grad_advantages is None and grad_returns is None:
        return (None,) * 14
    gradients = _backward_operator(
        *ctx.saved_tensors, *ctx.options, grad_advantages, grad_returns, ctx.backend
    )
    cast = [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
    return (*cast, *(None,) * 10)


_operator = Operator("gae", _forward, _fake_forward, _save, _differentiate)
