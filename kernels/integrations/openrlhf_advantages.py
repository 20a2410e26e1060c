"""GAE and returns of OpenRLHF's experience maker, which loops over the steps: one reverse scan.

It multiplies rewards and values by the mask and goes on: a masked step decays the trace, and has an
advantage and a return like any other. Differs: a NaN in a masked slot does not spread.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.openrlhf_library import EXPERIENCE, library, same_shape
from warpo.kernels.integrations.patching import as_flags, promoted, served


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
    served_here = _serves(rewards, action_mask, gamma) and served(values, rewards)
    if not served_here or not same_shape(rewards, values) or not 0 <= lambd <= 1:
        return original(self, values, rewards, action_mask, gamma, lambd)
    dtype = promoted(values, rewards, action_mask)
    advantages, returns = ops.gae(
        _masked(rewards, action_mask), _masked(values, action_mask), gamma=gamma, gae_lambda=lambd
    )
    return advantages.to(dtype), returns.to(dtype)


@library.replaces(EXPERIENCE, "RemoteExperienceMaker.get_cumulative_returns", "discounted_returns")
@torch.no_grad()
def get_cumulative_returns(
    original: Callable, self: Any, rewards: Tensor, action_mask: Tensor, gamma: float
) -> Tensor:
    if not _serves(rewards, action_mask, gamma) or not served(rewards):
        return original(self, rewards, action_mask, gamma)
    returns = ops.discounted_returns(_masked(rewards, action_mask), gamma=gamma)
    return returns.to(rewards.dtype)


def _serves(rewards: Tensor, action_mask: Tensor | None, gamma: float) -> bool:
    return rewards.dim() == 2 and same_shape(rewards, action_mask) and 0 <= gamma <= 1


def _masked(steps: Tensor, action_mask: Tensor | None) -> Tensor:
    flags = as_flags(action_mask)
    return steps if flags is None else torch.where(flags.bool(), steps, 0)
