"""The loops of single-file PPO, as CleanRL writes them, on NumPy arrays or tensors:

    from warpo.kernels.integrations import arrays

    advantages, returns = arrays.gae(
        rewards, values, dones, next_value, next_done, gamma, gae_lambda
    )

Arrays of any strides and byte order are taken as they are, and results are of the same kind.
Advantages are not normalised here: (A - mean) / (std + 1e-8) over a minibatch of 32 to 2048 is no
faster in one kernel than in NumPy or torch. Needs only torch and NumPy.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from warpo.kernels import _scan, dispatch, ops
from warpo.kernels._arguments.gae import GaeArguments, ScanArguments
from warpo.kernels._checks import FLAGS, FLOATS
from warpo.kernels._policy_metrics import METRICS
from warpo.kernels.integrations._array_views import flags, floats, view
from warpo.kernels.objectives import Objective

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
        rewards: (T, N), or (T,) of one environment: a NumPy array or tensor, of any strides.
        values: like rewards. Of rewards and values, one may be of integers or bool, as clipped
            Atari rewards are: both become the dtype that NumPy or torch gives them together, which
            must be float16 | float32 | float64 or, of tensors, bfloat16.
        dones: like rewards, bool or numbers: not 0 at t where the observation at t is the first of
            an episode; the episode_starts of Stable-Baselines3.
        next_value: (N,), (1, N) or (N, 1), or a number for one environment: of the observation
            after the last step.
        next_done: likewise, bool or numbers: whether that observation is the first of an episode.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1].

    Returns:
        advantages, returns: tensors where rewards is one, else NumPy arrays; the other arguments
        may be of either kind. They have the shape of rewards and the dtype that rewards and values
        have together. With tensors differentiable in rewards, values and next_value.

    Raises:
        ValueError: a kind, shape, dtype or number is not as above.

    float64 goes through the loop, in float64; all else through one scan in float32, which does not
    read values behind the end of an episode: NaN does not spread from there.
    """
    convert: Any = _as_tensor if isinstance(rewards, Tensor) else _as_numpy
    like = rewards
    rewards, values = convert("rewards", rewards, like), convert("values", values, like)
    dones, next_done = convert("dones", dones, like), convert("next_done", next_done, like)
    next_value = convert("next_value", next_value, like)
    _check_shapes(rewards, values, dones, next_value, next_done)
    _scan.check_discount("gamma", gamma)
    _scan.check_discount("gae_lambda", gae_lambda)
    if isinstance(rewards, Tensor):
        dtype: Any = torch.promote_types(rewards.dtype, values.dtype)
        known: Any = _KNOWN
        rewards, values = rewards.to(dtype), values.to(dtype)
        compute: Any = _loop if dtype == torch.float64 else _gae_tensors
    else:
        dtype, known = np.result_type(rewards, values), _FLOATS
        compute = _loop if dtype == np.float64 else _gae_numpy
    if dtype not in known:
        raise ValueError(
            f"rewards and values are {dtype} together, and must be float16 | float32 | float64: "
            "convert values to float32"
        )
    if compute is _loop:
        rewards, values, next_value = (
            x.to(dtype) if isinstance(x, Tensor) else x.astype(dtype, copy=False)
            for x in (rewards, values, next_value)
        )
    return compute(rewards, values, dones, next_value, next_done, gamma, gae_lambda, dtype)


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
        Both are 0 for a minibatch of 0.

    Raises:
        ValueError: a kind, shape, dtype or number is not as above.

    Source: https://arxiv.org/abs/1707.06347 eq. 7; http://joschu.net/blog/kl-approx.html.
    """
    _check_minibatch(newlogprob=newlogprob, oldlogprob=oldlogprob, advantages=advantages)
    loss, metrics = ops.policy_loss(
        newlogprob[None], oldlogprob[None], advantages[None], _clip(clip_coef)
    )
    return PolicyLoss(loss, metrics[_APPROX_KL] / max(newlogprob.numel(), 1))


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
        ValueError: a kind, shape, dtype or number is not as above.

    Source: https://arxiv.org/abs/2005.12729 section 3.
    """
    _check_minibatch(newvalue=newvalue, returns=returns)
    if values is not None:
        _check_minibatch(newvalue=newvalue, values=values)
    elif clip_coef is not None:
        raise ValueError("values must be given with clip_coef")
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
    advantages, returns = found = np.empty((2, *rewards.shape), np.float32)
    given = (rewards, values, dones, next_value, next_done)
    gae_into(advantages, returns, *given, gamma=gamma, gae_lambda=gae_lambda)
    return Gae(*found.astype(dtype, copy=False))


def gae_into(
    advantages: np.ndarray,
    returns: np.ndarray,
    rewards: np.ndarray,
    values: np.ndarray,
    dones: np.ndarray,
    next_value: np.ndarray,
    next_done: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> None:
    """`gae` of NumPy arrays of the right shapes, computed in float32, into float32 arrays for which
    `is_readable` holds.

    Straight to the CPU backend: the tensors of `ops.gae` take 60 us, which is more than the loop
    over the 5 steps of A2C.
    """
    if not rewards.size:
        return
    arrays = (
        floats(rewards),
        floats(values),
        flags(dones),
        floats(next_value.reshape(-1)),
        flags(next_done.reshape(-1)),
        advantages,
        returns,
    )
    r, v, d, last_v, last_d, a, g = map(view, arrays)
    scan = ScanArguments(
        mask=None,
        terminated=d,
        truncated=None,
        last_terminated=last_d,
        last_truncated=None,
        cu_seqlens=None,
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask_mode=0,
        starts_at_t=True,
    )
    arguments = GaeArguments(
        scan=scan,
        rows=next_value.size,
        steps=len(rewards),
        rewards=r,
        terminal_rewards=None,
        values=v,
        last_values=last_v,
        final_values=None,
        advantages=a,
        returns=g,
    )
    dispatch.load("cpu").gae_forward(arguments)


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
    next_value = next_value if next_value.dtype in FLOATS else next_value.float()
    found = ops.gae(
        *map(_two_dimensional, (rewards, values)),
        gamma=gamma,
        gae_lambda=gae_lambda,
        time_dim=0,
        terminated=_two_dimensional(dones),
        last_values=next_value.reshape(-1),
        last_terminated=next_done.reshape(-1),
        done_convention="starts_at_t",
    )
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
    empty: Any = torch.empty_like if isinstance(rewards, Tensor) else np.empty_like
    advantages = empty(rewards, dtype=dtype)
    no_start, alive = dones == 0, next_done.reshape(rewards.shape[1:]) == 0
    after, advantage = next_value.reshape(rewards.shape[1:]), 0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * after * alive - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * advantage * alive
        alive, after = no_start[t], values[t]
    return Gae(advantages, advantages + values)


def _as_numpy(name: str, value: Any, like: np.ndarray) -> np.ndarray:
    """A plain array of bool or real numbers, in the byte order of the machine."""
    if type(value) is np.ndarray and value.dtype in _NATIVE:
        return value
    if isinstance(value, Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    elif isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, whose mask would be lost: fill it")
    elif isinstance(value, _NUMBERS) and name.startswith("next"):
        value = np.asarray(value)
    elif not isinstance(value, np.ndarray):
        raise ValueError(_no_array(name, value))
    if value.dtype.kind not in "biu" and value.dtype.type not in _FLOATS:
        raise ValueError(
            f"{name} must be bool, integers or float16 | float32 | float64, got {value.dtype}: "
            f"convert {name} to float32"
        )
    native = value.astype(value.dtype.newbyteorder("="), copy=False)
    return native if type(native) is np.ndarray else np.asarray(native)


def _as_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """A tensor of bool or real numbers, on the device of `like`."""
    if isinstance(value, np.ndarray):
        value = torch.tensor(_as_numpy(name, value, value).copy(), device=like.device)
    elif isinstance(value, _NUMBERS) and name.startswith("next"):
        value = torch.as_tensor(value, device=like.device)
        value = value.float() if value.is_floating_point() else value
    elif not isinstance(value, Tensor):
        raise ValueError(_no_array(name, value))
    if value.is_complex() or (value.is_floating_point() and value.dtype not in _KNOWN):
        raise ValueError(
            f"{name} must be bool, integers or bfloat16 | float16 | float32 | float64, got "
            f"{str(value.dtype).removeprefix('torch.')}: convert {name} to float32"
        )
    return value.bool() if name.endswith(("dones", "done")) and value.dtype not in FLAGS else value


def _no_array(name: str, value: Any) -> str:
    kind = type(value).__name__
    return f"{name} must be a NumPy array or tensor, got {kind}: pass numpy.asarray({name})"


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
            f"next_value and next_done must be one per environment, {rows}, got "
            f"{tuple(next_value.shape)} and {tuple(next_done.shape)}"
        )


def _check_minibatch(**tensors: Tensor) -> None:
    """1-D tensors as long as the first."""
    size = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{name} must be a tensor, got {kind}: pass torch.as_tensor({name})")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} must be float32 | bfloat16 | float16, got "
                f"{str(tensor.dtype).removeprefix('torch.')}: pass {name}.float()"
            )
        size = tensor.numel() if size is None else size
        if tensor.shape != (size,):
            raise ValueError(f"{name} must be ({size},), got {tuple(tensor.shape)}")


_KNOWN = (*FLOATS, torch.float64)
_NATIVE = frozenset(map(np.dtype, ("float32", "bool", "float64")))
_FLOATS = (np.float16, np.float32, np.float64)
_NUMBERS = (bool, int, float, np.bool_, np.number)
