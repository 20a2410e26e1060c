"""The clipped value loss, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.sequences import (
    counted,
    mean_and_m2,
    over_denominator,
    sequences_of,
)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    denominator: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_range: float | None = None,
    huber_delta: float = torch.inf,
    sequence_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `VALUE_METRICS`. values `[B, T]`, or `[N]` with
    cu_seqlens.
    """
    values = counted(values, denominator)
    sequences = sequences_of(values, mask, cu_seqlens)
    valid = sequences.valid
    v, returns = sequences.clean(values), sequences.clean(returns)
    unclipped = clipped = _huber(v - returns, huber_delta)
    if clip_range is not None and old_values is not None:
        old = sequences.clean(old_values)
        clipped = _huber(v.clamp(old - clip_range, old + clip_range) - returns, huber_delta)
    weight = valid.to(v.dtype)
    if sequence_mean:
        weight = weight / sequences.spread(sequences.counts(weight.dtype).clamp(min=1))
    loss = over_denominator((weight * torch.max(unclipped, clipped)).sum(), denominator)
    with torch.no_grad():
        kept_returns, kept_errors = returns[valid], (returns - v)[valid]
        metrics = torch.stack(
            [
                loss,
                valid.sum().to(v.dtype),
                (clipped > unclipped)[valid].sum().to(v.dtype),
                *mean_and_m2(kept_returns),
                *mean_and_m2(kept_errors),
            ]
        )
    return loss, metrics


def _huber(x: Tensor, delta: float) -> Tensor:
    # delta may be inf, which a torch.where over both formulas would bring into the gradient
    bounded = x.clamp(-delta, delta)
    return bounded * (x - 0.5 * bounded)
