"""Reverse-time recursions, in plain PyTorch, one step at a time."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
    done_convention: str = "ends_at_t",
    last_terminated: Tensor | None = None,
    last_truncated: Tensor | None = None,
    time_dim: int = -1,
) -> GaeOutput:
    """Generalised advantage estimation by the recursion itself, one step at a time from the
    last.
    """
    rewards, values = rewards.movedim(time_dim, -1), values.movedim(time_dim, -1)

    def ends(flags: Tensor | None, last: Tensor | None) -> Tensor:
        if flags is None:
            return torch.zeros_like(rewards, dtype=torch.bool)
        flags = flags.movedim(time_dim, -1).bool()
        if done_convention == "ends_at_t":
            return flags
        tail = torch.zeros_like(flags[..., :1]) if last is None else last.bool()[..., None]
        return torch.cat([flags[..., 1:], tail], -1)

    terminal, cut = ends(terminated, last_terminated), ends(truncated, last_truncated)
    valid = torch.ones_like(terminal) if mask is None else mask.movedim(time_dim, -1).bool()
    final = None if final_values is None else final_values.movedim(time_dim, -1)
    zero = values.new_zeros(values.shape[:-1])
    next_value = zero if last_values is None else last_values
    next_advantage = zero
    advantages: list[Tensor] = []
    for t in reversed(range(rewards.shape[-1])):
        keep, term = valid[..., t], terminal[..., t]
        value = torch.where(keep, values[..., t], 0)
        reward = torch.where(keep, rewards[..., t], 0)
        bootstrap = next_value
        if final is not None:
            bootstrap = torch.where(cut[..., t] & keep, final[..., t], bootstrap)
        bootstrap = torch.where(term & keep, 0, bootstrap)
        trace = torch.where((term | cut[..., t]) & keep, 0, next_advantage)
        advantage = reward + gamma * bootstrap - value + gamma * gae_lambda * trace
        advantages.append(torch.where(keep, advantage, 0))
        if mask_mode == "carry":
            next_value = torch.where(keep, value, next_value)
            next_advantage = torch.where(keep, advantage, next_advantage)
        else:
            next_value, next_advantage = value, advantage
    stacked = torch.stack(advantages[::-1], -1) if advantages else torch.zeros_like(rewards)
    returns = torch.where(valid, stacked + values, 0)
    return GaeOutput(stacked.movedim(-1, time_dim), returns.movedim(-1, time_dim))
