"""Whitening over all valid elements, in plain PyTorch."""

import torch
from torch import Tensor


def whiten(
    x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + eps) of the valid elements, plus mean without
    shift_mean; 0 at masked ones.
    """
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    valid = x[keep]
    if valid.numel() == 0:
        return torch.zeros_like(x)
    mean = valid.mean()
    variance = valid.var() if valid.numel() > 1 else torch.zeros_like(mean)
    centred = valid - mean
    whitened = centred if variance + eps == 0 else centred / (variance + eps).sqrt()
    return torch.zeros_like(x).masked_scatter(keep, whitened if shift_mean else whitened + mean)
