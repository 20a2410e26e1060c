"""Advantages and returns, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels.reference.recursion import recursion, valid_steps


class GaeOutput(NamedTuple):
    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **steps,
) -> GaeOutput:
    """Generalised advantage estimation; `steps` are the options of `recursion`."""
    steps |= {"mask": mask, "cu_seqlens": cu_seqlens}
    advantages, _ = recursion(rewards, values, gamma, gae_lambda, **steps)
    valid = valid_steps(values, mask, cu_seqlens)
    return GaeOutput(advantages, torch.where(valid, advantages + values, 0))


def discounted_returns(rewards: Tensor, gamma: float, **steps) -> Tensor:
    """Rewards to go: lambda returns with lambda 1 and no values."""
    return gae(rewards, torch.zeros_like(rewards), gamma, 1.0, **steps).returns


def lambda_returns(
    rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float, **steps
) -> Tensor:
    """Advantages and values added up."""
    return gae(rewards, values, gamma, gae_lambda, **steps).returns
