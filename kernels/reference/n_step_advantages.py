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
        advantages = torch.zeros_like(values)
        for b, span in enumerate(spans(cu_seqlens)):
            advantages[span] = n_step_advantages(
                rewards[span][None],
                values[span][None],
                n,
                gamma,
                mask=None if mask is None else mask[span][None],
                mask_mode=mask_mode,
                last_values=None if last_values is None else last_values[b, None],
            )[0][0]
        valid = valid_steps(values, mask, cu_seqlens)
        return advantages, torch.where(valid, advantages + values, 0)
    valid = valid_steps(values, mask, None)
    if mask_mode == "compact":
        rewards = move_tail(rewards, valid)
    rewards, values = torch.where(valid, rewards, 0), torch.where(valid, values, 0)
    rows, steps = values.shape
    next_value = values.new_zeros(rows) if last_values is None else last_values
    # gamma^l delta_{t+l} of the next n steps
    window = values.new_zeros(rows, min(n, max(steps, 1)))
    columns = []
    for t in reversed(range(steps)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        moved = torch.cat([delta[:, None], gamma * window[:, :-1]], 1)
        counts = valid[:, t] | (mask_mode == "zero")
        window = torch.where(counts[:, None], moved, window)
        next_value = torch.where(counts, values[:, t], next_value)
        columns.append(torch.where(valid[:, t], window.sum(1), 0))
    advantages = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(values)
    return advantages, torch.where(valid, advantages + values, 0)
