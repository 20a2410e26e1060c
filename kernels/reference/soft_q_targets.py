"""Targets of soft Q-functions, in plain PyTorch."""

import torch
from torch import Tensor


def soft_q_targets(
    rewards: Tensor,
    terminated: Tensor,
    next_q1: Tensor,
    next_q2: Tensor,
    next_logprobs: Tensor,
    alpha: Tensor,
    gamma: float,
) -> Tensor:
    """`[B]`, of vectors `[B]`; alpha `()`."""
    next_values = torch.minimum(next_q1, next_q2) - alpha * next_logprobs
    return torch.where(terminated.bool(), rewards, rewards + gamma * next_values)
