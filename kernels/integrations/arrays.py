"""The loops of single-file PPO, as CleanRL writes them, on NumPy arrays or tensors:

    from warpo.kernels.integrations import arrays

    advantages, returns = arrays.gae(
        rewards, values, dones, next_value, next_done, gamma, gae_lambda
    )

Arrays are taken as they are and results are of the same kind. Advantages are not normalised here:
(A - mean) / (std + 1e-8) over a minibatch of 32 to 2048 is no faster in one kernel than in NumPy or
torch. Needs torch and NumPy alone.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from warpo.kernels import dispatch, ops, scan
from warpo.kernels.integrations.patching import as_flags
from warpo.kernels.native import DTYPE_CODES
from warpo.kernels.objectives import Objective
from warpo.kernels.policy_metrics import METRICS

Array = Any
"""numpy.ndarray or Tensor."""


class Gae(NamedTuple):
    advantages: Array
    returns: Array


class PolicyLoss(NamedTuple):
    loss: Tensor
    approx_kl: Tensor


def gae(
    rewards: Array,
    values: Array,
    dones: Array,
    next_value: Array,
    next_done: Array,
    gamma: float,
    gae_lambda: float,
) -> Gae:
    """Advantages and returns of a rollout, with A_T = 0:

        alive_t = 1 - done_{t+1}
        delta_t = r_t + gamma alive_t V_{t+1} - V_t
        A_t     = delta_t + gamma lambda alive_t A_{t+1}            returns_t = A_t + V_t

    Args:
        rewards: (T, N), or (T,) of one environment; float32 | float64, tensors also bfloat16 |
            float16; any strides. Not copied, unless it is a NumPy array that runs backwards.
        values: like rewards.
        dones: like rewards, of any dtype: not 0 at t where the observation at t is the first of an
            episode; the episode_starts of Stable-Baselines3.
        next_value: (N,), (1, N) or (N, 1): of the observation after the last step.
        next_done: likewise, any dtype: whether that observation is the first of an episode.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1].

    Returns:
        advantages, returns: tensors where rewards is one, else NumPy arrays; of the shape of
        rewards and the dtype that rewards and values have together. With tensors differentiable in
        rewards, values and next_value.

    Raises:
        ValueError: a shape, dtype or number is not as above.

    float64 goes through the loop, in float64; all else through one scan in float32, which does not
    read values behind the end of an episode: NaN does not spread from there.
    """
    per_step = (rewards, values, dones)
    last: tuple[Array, ...] = (next_value, next_done)
    dtype: Any
    _check_shapes(*per_step, *last)
    if isinstance(rewards, Tensor):
        last = tuple(x if isinstance(x, Tensor) else torch.as_tensor(x) for x in last)
        dtype = torch.promote_types(rewards.dtype, values.dtype)
        compute = _loop if dtype == torch.float64 else _gae_tensors
    else:
        last = tuple(x.detach().cpu().numpy() if isinstance(x, Tensor) else x for x in last)
        dtype = np.result_type(rewards, values)
        if dtype not in (np.float32, np.float64):
            raise ValueError(f"rewards and values must be float32 | float64, got {dtype}")
        compute = _loop if dtype == np.float64 else _gae_numpy
    return compute(*per_step, last[0], last[1], gamma, gae_lambda, dtype)


def policy_loss(
    newlogprob: Tensor, oldlogprob: Tensor, advantages: Tensor, clip_coef: float
) -> PolicyLoss:
    """The clipped loss of PPO: mean of max(-A ratio, -A clip(ratio, 1 - clip_coef, 1 + clip_coef)).

    Args:
        newlogprob: (N,) float32 | bfloat16 | float16, of the policy that learns. Differentiable.
        oldlogprob: (N,), of the policy that took the steps. A constant.
        advantages: (N,). A constant.
        clip_coef: in [0, 1].

    Returns:
        loss: () float32. The entropy bonus is not part of it.
        approx_kl: () float32, mean of (ratio - 1) - log ratio. A constant.

    Raises:
        ValueError: a shape, dtype or number is not as above.

    Source: https://arxiv.org/abs/1707.06347 eq. 7; http://joschu.net/blog/kl-approx.html.
    """
    loss, metrics = ops.policy_loss(
        newlogprob[None], oldlogprob[None], advantages[None], _clip(clip_coef)
    )
    return PolicyLoss(loss, metrics[_APPROX_KL] / newlogprob.numel())


def value_loss(
    newvalue: Tensor, values: Tensor | None, returns: Tensor, clip_coef: float | None = None
) -> Tensor:
    """Half the mean squared error of the critic: 0.5 mean of (V - R)^2; with clip_coef of max((V -
    R)^2, (clip(V, V_old - clip_coef, V_old + clip_coef) - R)^2).

    Args:
        newvalue: (N,) float32 | bfloat16 | float16. Differentiable.
        values: (N,), V_old, of the critic when the steps were taken. A constant. May be None
            without clip_coef.
        returns: (N,). A constant.
        clip_coef: as of the policy, or None.

    Returns:
        () float32.

    Raises:
        ValueError: a shape, dtype or number is not as above.

    Source: https://arxiv.org/abs/2005.12729 section 3.
    """
    old = None if values is None else values[None]
    return ops.value_loss(newvalue[None], old, returns[None], clip_range=clip_coef).loss


_APPROX_KL = METRICS.index("approx_kl")


@functools.lru_cache
def _clip(clip_coef: float) -> Objective:
    return Objective(clip_low=clip_coef, clip_high=clip_coef)


def _gae_numpy(
    rewards: np.ndarray,
    values: np.ndarray,
    dones: np.ndarray,
    next_value: np.ndarray,
    next_done: np.ndarray,
    gamma: float,
    gae_lambda: float,
    dtype: np.dtype,
) -> Gae:
    """Straight to the CPU backend: the tensors of `ops.gae` take 60 us, which is more than the loop
    over the 5 steps of A2C.
    """
    scan.check_discount("gamma", gamma)
    scan.check_discount("gae_lambda", gae_lambda)
    advantages, returns = (np.empty(rewards.shape, np.float32) for _ in range(2))
    arrays = (
        _readable(rewards), _readable(values), _flags(dones),
        next_value.astype(np.float32).reshape(-1), _flags(next_done.reshape(-1)),
        advantages, returns,
    )  # fmt: skip
    r, v, d, last_v, last_d, a, g = map(_view, arrays)
    if rewards.size:
        dispatch.load("cpu").gae_forward(
            next_value.size, len(rewards), None, r, None, v, last_v, None, None, d, None, last_d,
            None, gamma, gae_lambda, 0, True, a, g,
        )  # fmt: skip
    return Gae(advantages, returns)


def _gae_tensors(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    next_value: Tensor,
    next_done: Tensor,
    gamma: float,
    gae_lambda: float,
    dtype: torch.dtype,
) -> Gae:
    found = ops.gae(
        *map(_two_dimensional, (rewards, values)), gamma=gamma, gae_lambda=gae_lambda, time_dim=0,
        terminated=as_flags(_two_dimensional(dones)), last_values=next_value.reshape(-1),
        last_terminated=as_flags(next_done.reshape(-1)), done_convention="starts_at_t",
    )  # fmt: skip
    return Gae(*(x.to(dtype).reshape(rewards.shape) for x in found))


def _two_dimensional(tensor: Tensor) -> Tensor:
    return tensor[:, None] if tensor.dim() == 1 else tensor


def _loop(
    rewards: Array,
    values: Array,
    dones: Array,
    next_value: Array,
    next_done: Array,
    gamma: float,
    gae_lambda: float,
    dtype: Any,
) -> Gae:
    scan.check_discount("gamma", gamma)
    scan.check_discount("gae_lambda", gae_lambda)
    empty: Any = torch.empty_like if isinstance(rewards, Tensor) else np.empty_like
    advantages = empty(rewards, dtype=dtype)
    no_start, alive = dones == 0, next_done.reshape(rewards.shape[1:]) == 0
    after, advantage = next_value.reshape(rewards.shape[1:]), 0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * after * alive - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * advantage * alive
        alive, after = no_start[t], values[t]
    return Gae(advantages, advantages + values)


def _check_shapes(
    rewards: Array, values: Array, dones: Array, next_value: Array, next_done: Array
) -> None:
    shape = rewards.shape
    if len(shape) not in (1, 2):
        raise ValueError(f"rewards must be (T, N) or (T,), got {tuple(shape)}")
    if not shape == values.shape == dones.shape:
        raise ValueError(
            f"values and dones must be of the shape of rewards, {tuple(shape)}, got "
            f"{tuple(values.shape)} and {tuple(dones.shape)}"
        )
    rows = shape[1] if len(shape) == 2 else 1
    if not rows == math.prod(next_value.shape) == math.prod(next_done.shape):
        raise ValueError(
            f"next_value and next_done must be one an environment, {rows}, got "
            f"{tuple(next_value.shape)} and {tuple(next_done.shape)}"
        )


def _readable(array: np.ndarray) -> np.ndarray:
    """With strides that are multiples of the element, not negative."""
    if array.flags.aligned and min(array.strides, default=0) >= 0:
        return array
    return array.copy()


def _flags(array: np.ndarray) -> np.ndarray:
    return _readable(array if array.dtype in (np.bool_, np.uint8) else array != 0)


def _view(array: np.ndarray) -> tuple[int, int, int, int]:
    """The View of csrc/view.h of (T, N) or (T,) as [N, T], or of (N,): address, strides, dtype."""
    size, strides = array.itemsize, array.strides
    code = _FLOAT32 if size == 4 else _UINT8
    return array.ctypes.data, strides[-1] // size, strides[0] // size, code


_FLOAT32, _UINT8 = DTYPE_CODES[torch.float32], DTYPE_CODES[torch.uint8]
