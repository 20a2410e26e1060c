"""One number from the values of a batch of sequences, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.sequences import over_denominator, sequences_of


def aggregate(
    values: Tensor,
    aggregation: str,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | None = None,
) -> Tensor:
    """`()`, of values `[B, T]`, or `[N]` with cu_seqlens. denominator: the count if not given."""
    sequences = sequences_of(values, mask, cu_seqlens)
    weight = sequences.valid.to(values.dtype)
    if mask is not None and mask.is_floating_point():
        weight = sequences.clean(torch.where(mask >= 0, mask, torch.nan).to(values.dtype))
    tokens = weight.sum()
    if aggregation == "sequence-mean-token-mean":
        totals = sequences.spread(sequences.sum(weight))
        weight = weight / torch.where(totals == 0, 1, totals)
    if denominator is None:
        number = torch.full_like(tokens, sequences.number)
        denominator = tokens if aggregation == "token-mean" else number
    result = over_denominator((weight * sequences.clean(values)).sum(), denominator)
    return torch.where(tokens.isnan(), tokens, result)  # a NaN is no denominator of 0
