"""Returns of steps that another policy took, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.recursion import recursion, valid_steps


def off_policy_returns(
    rewards: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    gamma: float = 1.0,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_ratio_limit: float = 20.0,
    **steps,
) -> Tensor:
    """G_t = r_t + gamma w_{t+1} G_{t+1}; `steps` are the options of `recursion`."""
    valid = valid_steps(rewards, mask, cu_seqlens)
    log_ratio = torch.where(valid, logprobs, 0) - torch.where(valid, old_logprobs, 0)
    ratio = log_ratio.clamp(-log_ratio_limit, log_ratio_limit).exp()
    weights = (ratio, ratio, torch.ones_like(ratio))
    steps |= {"mask": mask, "cu_seqlens": cu_seqlens}
    _, returns = recursion(rewards, torch.zeros_like(rewards), gamma, 1.0, weights, **steps)
    return returns
