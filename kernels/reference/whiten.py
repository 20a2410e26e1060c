"""Whitening over all valid elements, in plain PyTorch."""

import torch
from torch import Tensor


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    fill_masked: bool = False,
) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + eps) with mean and variance of the valid elements, plus
    mean without shift_mean; 0 at masked ones unless fill_masked.
    """
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    valid = x[keep]
    mean = valid.mean() if valid.numel() else x.new_zeros(())
    variance = valid.var() if valid.numel() > 1 else torch.zeros_like(mean)
    centred = (x if fill_masked else valid) - mean
    whitened = torch.zeros_like(centred)
    if variance + eps != 0:
        whitened = centred / (variance + eps).sqrt()
    whitened = whitened if shift_mean else whitened + mean
    return whitened if fill_masked else torch.zeros_like(x).masked_scatter(keep, whitened)
