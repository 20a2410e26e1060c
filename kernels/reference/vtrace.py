"""V-trace, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.recursion import recursion, valid_steps


def vtrace(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    *,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    pg_rho_max: float = 1.0,
    gae_lambda: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_ratio_limit: float = 20.0,
    **steps,
) -> tuple[Tensor, Tensor]:
    """(returns, advantages)."""
    valid = valid_steps(logprobs, mask, cu_seqlens)
    log_ratio = torch.where(valid, logprobs, 0) - torch.where(valid, old_logprobs, 0)
    ratio = log_ratio.clamp(-log_ratio_limit, log_ratio_limit).exp()
    weights = (ratio.clamp(max=rho_max), ratio.clamp(max=c_max), ratio.clamp(max=pg_rho_max))
    steps |= {"mask": mask, "cu_seqlens": cu_seqlens}
    x, advantages = recursion(rewards, values, gamma, gae_lambda, weights, **steps)
    return torch.where(valid, x + values, 0), advantages
