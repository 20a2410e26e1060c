"""Advantages of n steps, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.recursion import move_tail, spans, valid_steps


def n_step_advantages(
    rewards: Tensor,
    values: Tensor,
    n: int,
    gamma: float,
    *,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns)."""
    if cu_seqlens is not None:
        advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
        for b, span in enumerate(spans(cu_seqlens)):
            found = n_step_advantages(
                rewards[span][None],
                values[span][None],
                n,
                gamma,
                mask=None if mask is None else mask[span][None],
                mask_mode=mask_mode,
                last_values=None if last_values is None else last_values[b, None],
            )
            advantages[span], returns[span] = found[0][0], found[1][0]
        return advantages, returns
    valid = valid_steps(values, mask, None)
    if mask_mode == "compact":
        rewards = move_tail(rewards, valid)
    rewards, values = torch.where(valid, rewards, 0), torch.where(valid, values, 0)
    rows, steps = values.shape
    n = min(n, max(steps, 1))
    # gamma^l r_{t+l} for l < n and gamma^l V_{t+l} for l <= n, of the steps ahead
    ahead, states = values.new_zeros(rows, n), values.new_zeros(rows, n + 1)
    if last_values is not None:
        states[:, 0] = last_values
    left = torch.zeros(rows, dtype=torch.long, device=values.device)
    columns = []
    for t in reversed(range(steps)):
        counts = valid[:, t] | (mask_mode == "zero")
        left = left + counts
        every = counts[:, None]
        ahead = torch.where(every, _moved(rewards[:, t], gamma, ahead), ahead)
        states = torch.where(every, _moved(values[:, t], gamma, states), states)
        bootstrap = states.gather(1, left.clamp(max=n)[:, None])[:, 0]
        columns.append(torch.where(valid[:, t], ahead.sum(1) + bootstrap, 0))
    returns = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(values)
    return torch.where(valid, returns - values, 0), returns


def _moved(first: Tensor, gamma: float, ahead: Tensor) -> Tensor:
    return torch.cat([first[:, None], gamma * ahead[:, :-1]], 1)
