"""Advantages from rewards of steps, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.group_advantages import group_advantages
from warpo.kernels.reference.sequences import sequence_of


def process_advantages(
    step_rewards: Tensor,
    step_offsets: Tensor,
    step_ends: Tensor,
    num_tokens: int,
    group_ids: Tensor,
    num_groups: int,
    *,
    cu_seqlens: Tensor | None = None,
    std: str = "sample",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantages [B, T] or [N], mean [groups], std [groups], number of groups whose steps all have
    one reward).
    """
    num_outputs = step_offsets.numel() - 1
    shape = (num_outputs, num_tokens) if cu_seqlens is None else (num_tokens,)
    advantages = step_rewards.new_zeros(shape)
    output_of_step, counts = sequence_of(step_offsets, step_rewards.numel())
    group_of_step = torch.where(counts, group_ids[output_of_step] if num_outputs else -1, -1)
    normalised, mean, spread, degenerate = group_advantages(
        step_rewards, group_of_step, num_groups, std=std, eps=eps
    )
    for b in range(num_outputs):
        steps = counts & (output_of_step == b)
        row = advantages[b] if cu_seqlens is None else advantages[cu_seqlens[b] : cu_seqlens[b + 1]]
        token = torch.arange(row.numel(), device=row.device)
        reaches = step_ends[steps][None, :] >= token[:, None]
        row += torch.where(reaches, normalised[steps][None, :], 0.0).sum(1)
    return advantages, mean, spread, degenerate
