"""Sequences of padded or packed tokens, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Index of the sequence of every token, in one row; which tokens are valid; how many there
    are.
    """

    sequence: Tensor
    valid: Tensor
    number: int

    def clean(self, x: Tensor) -> Tensor:
        """In one row, with 0 in slots that are not valid."""
        return torch.where(self.valid, x.reshape(-1), 0)

    def sum(self, x: Tensor) -> Tensor:
        """One sum a sequence."""
        return torch.zeros(self.number, dtype=x.dtype, device=x.device).index_add(
            0, self.sequence, x
        )


def sequences_of(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Sequences:
    """Of a tensor `[B, T]`, or `[N]` with cu_seqlens."""
    valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    valid = valid.reshape(-1)
    if cu_seqlens is None:
        number = like.shape[0]
        index = torch.arange(number, device=like.device)[:, None].expand(like.shape).reshape(-1)
        return Sequences(index, valid, number)
    number = cu_seqlens.numel() - 1
    token = torch.arange(like.numel(), device=like.device)
    index = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    inside = (index >= 0) & (index < number)
    return Sequences(index.clamp(0, max(number - 1, 0)), valid & inside, number)


def over_denominator(x: Tensor, denominator: Tensor) -> Tensor:
    """x / denominator: 0 where it is 0, NaN where it is negative or NaN."""
    positive = torch.where(denominator > 0, denominator, torch.nan)
    zero = denominator == 0
    return torch.where(zero, 0, torch.where(zero, 0, x) / torch.where(zero, 1, positive))


def counted(x: Tensor, denominator: Tensor) -> Tensor:
    """x, whose gradient is 0 where the denominator is 0, also through what is not finite."""
    return torch.where(denominator == 0, x.detach(), x)


def mean_and_m2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared differences from it; 0 of nothing."""
    mean = x.sum() / max(x.numel(), 1)
    return mean, (x - mean).square().sum()
