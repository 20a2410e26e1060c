"""Sequences of padded or packed tokens, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Index of the sequence of every token, in one row; which tokens are valid; how many sequences
    there are. A token of no sequence is not valid, and has the index of some sequence.
    """

    sequence: Tensor
    valid: Tensor
    number: int

    def clean(self, x: Tensor) -> Tensor:
        """In one row, with 0 in slots that are not valid."""
        return torch.where(self.valid, x.reshape(-1), 0)

    def sum(self, x: Tensor) -> Tensor:
        """One sum over valid tokens per sequence."""
        return torch.zeros(self.number, dtype=x.dtype, device=x.device).index_add(
            0, self.sequence[self.valid], x[self.valid]
        )

    def spread(self, x: Tensor) -> Tensor:
        """What its sequence has, for each token."""
        # of no sequences the sum is 0, and differentiable
        return x[self.sequence] if self.number else x.sum().expand(self.valid.shape)

    def counts(self, dtype: torch.dtype) -> Tensor:
        """Number of valid tokens of each sequence."""
        return self.sum(self.valid.to(dtype))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the valid tokens of its sequence, for each token."""
        return self.spread(self.sum(x) / self.counts(x.dtype).clamp(min=1))

    def prefix_sum(self, x: Tensor) -> Tensor:
        """The sum over its sequence up to each token."""
        total = torch.zeros_like(x)
        for b in range(self.number):
            mine = self.sequence == b
            total = total.masked_scatter(mine, x[mine].cumsum(0))
        return total


def sequences_of(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Sequences:
    """Of a tensor `[B, T]`, or `[N]` with cu_seqlens."""
    valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    valid = valid.reshape(-1)
    if cu_seqlens is None:
        number = like.shape[0]
        index = torch.arange(number, device=like.device)[:, None].expand(like.shape).reshape(-1)
        return Sequences(index, valid, number)
    number = cu_seqlens.numel() - 1
    index, inside = sequence_of(cu_seqlens, like.numel())
    return Sequences(index, valid & inside, number)


def sequence_of(offsets: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """Index of the sequence of each element, and whether it belongs to one."""
    number = offsets.numel() - 1
    place = torch.arange(elements, device=offsets.device)
    index = torch.searchsorted(offsets.long(), place, right=True) - 1
    inside = (index >= 0) & (index < number)
    return index.clamp(0, max(number - 1, 0)), inside


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
