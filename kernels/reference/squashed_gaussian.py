"""Tanh-squashed Gaussian actions, in plain PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
    log_slope = 2 * (math.log(2) - u + logsigmoid(2 * u))
    logprobs = -noise.square() / 2 - s - math.log(2 * math.pi) / 2 - log_slope
    return torch.tanh(u), logprobs.sum(-1)
