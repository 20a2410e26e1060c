"""GAE and returns of OpenRLHF's experience maker, which loops over the steps: one reverse scan.

It multiplies rewards and values by the mask and goes on: a masked step decays the trace, and has an
advantage and a return like any other. Differs: a NaN in a masked slot does not spread.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.openrlhf._library import EXPERIENCE, library, same_shape
from warpo.kernels.integrations.serving import as_flags, promoted, require, require_served


@library.replaces(EXPERIENCE, "RemoteExperienceMaker.get_advantages_and_returns", "gae")
@torch.no_grad()
def get_advantages_and_returns(
    original: Callable,
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    require_served(values, rewards)
    require(same_shape(rewards, values), "values and rewards of two shapes")
    require(0 <= lambd <= 1, "lambd outside [0, 1]")
    flags = _flags(rewards, action_mask, gamma)
    dtype = promoted(values, rewards, action_mask)
    advantages, returns = ops.gae(
        _masked(rewards, flags), _masked(values, flags), gamma=gamma, gae_lambda=lambd
    )
    return advantages.to(dtype), returns.to(dtype)


@library.replaces(EXPERIENCE, "RemoteExperienceMaker.get_cumulative_returns", "discounted_returns")
@torch.no_grad()
def get_cumulative_returns(
    original: Callable, self: Any, rewards: Tensor, action_mask: Tensor, gamma: float
) -> Tensor:
    require_served(rewards)
    flags = _flags(rewards, action_mask, gamma)
    returns = ops.discounted_returns(_masked(rewards, flags), gamma=gamma)
    return returns.to(rewards.dtype)


def _flags(rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor | None:
    require(rewards.dim() == 2, "rewards that are not [B, T]")
    require(same_shape(rewards, action_mask), "a mask of another shape than rewards")
    require(0 <= gamma <= 1, "gamma outside [0, 1]")
    return as_flags(action_mask)


def _masked(steps: Tensor, flags: Tensor | None) -> Tensor:
    return steps if flags is None else torch.where(flags, steps, 0)
