"""An AdamW step whose weights are rounded into another tensor, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.fingerprint import fingerprint


def adamw_publish(
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    published: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(fingerprint, number of changed elements, sum of |new - old| over master, over published)."""
    if master is None:
        master = published
    before, published_before = master.clone(), published.clone()
    g = grad.to(master.dtype).view(master.shape) * grad_scale
    master.mul_(1 - lr * weight_decay)
    exp_avg.add_((1 - beta1) * (g.view(exp_avg.shape) - exp_avg))
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * (g * g).view(exp_avg_sq.shape))
    corrected = (exp_avg_sq / (1 - beta2**step)).sqrt().view(master.shape)
    first = (exp_avg / (1 - beta1**step)).view(master.shape)
    master.sub_(lr * first / (corrected + eps))
    published.copy_(master.view(published.shape))
    size = {2: torch.int16, 4: torch.int32}[published.element_size()]
    changed = (published.view(size) != published_before.view(size)).sum()
    difference = published.to(master.dtype) - published_before.to(master.dtype)
    return fingerprint(published), changed, (master - before).abs().sum(), difference.abs().sum()
