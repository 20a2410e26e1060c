"""Tanh-squashed Gaussian actions, in plain PyTorch."""

import torch
from torch import Tensor

LN_2, LOG_2_PI = 0.6931471805599453, 1.8378770664093453


def squashed_gaussian(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    *,
    log_std_min: float = -20.0,
    log_std_max: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """(actions `[B, A]`, logprobs `[B]`)."""
    s = log_std.clamp(log_std_min, log_std_max)
    u = mean + s.exp() * noise
    # softplus(-2u) = -logsigmoid(2u); torch's softplus is the identity above 20
    log_slope = 2 * (LN_2 - u + torch.nn.functional.logsigmoid(2 * u))
    logprobs = -noise.square() / 2 - s - LOG_2_PI / 2 - log_slope
    return torch.tanh(u), logprobs.sum(-1)
