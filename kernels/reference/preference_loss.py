"""Losses of preferences, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.sequences import counted, over_denominator, sequences_of

logsigmoid = torch.nn.functional.logsigmoid


def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None,
    ref_rejected_logprobs: Tensor | None,
    denominator: Tensor,
    *,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    link: str = "logistic",
    beta: float = 0.1,
    reference: bool = True,
    length_normalise: bool = False,
    odds: bool = False,
    label_smoothing: float = 0.0,
    robust: bool = False,
    margin: float = 0.0,
    nll_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `PREFERENCE_METRICS`. The options are those of
    `Preference`.
    """
    chosen_logprobs = counted(chosen_logprobs, denominator)
    rejected_logprobs = counted(rejected_logprobs, denominator)
    if not reference:
        ref_chosen_logprobs = ref_rejected_logprobs = None
    chosen = completion_sums(chosen_logprobs, ref_chosen_logprobs, chosen_mask, chosen_cu_seqlens)
    rejected = completion_sums(
        rejected_logprobs, ref_rejected_logprobs, rejected_mask, rejected_cu_seqlens
    )
    pair = (chosen[0] > 0) & (rejected[0] > 0)
    (n, logp, x), (m, other_logp, y) = ([t[pair] for t in side] for side in (chosen, rejected))
    if length_normalise:
        x, y = x / n, y / m
    difference = _log_odds(x) - _log_odds(y) if odds else x - y
    if link == "square":
        losses = (difference - 1 / (2 * beta)).square()
    elif link == "hinge":
        losses = torch.relu(margin - beta * difference)
    else:
        z = (1.0 if odds else beta) * difference - margin
        flipped = -label_smoothing if robust else label_smoothing
        losses = -(1 - label_smoothing) * logsigmoid(z) - flipped * logsigmoid(-z)
        losses = losses * (beta if odds else 1.0) / (1 - 2 * label_smoothing if robust else 1.0)
    nll = -logp / n
    loss = over_denominator((losses + nll_coef * nll).sum(), denominator)
    correct = (x > y).to(x.dtype)
    sums = (pair.to(x.dtype), correct, beta * x, beta * y, logp, other_logp, nll)
    return loss, torch.stack([loss, *(value.sum() for value in sums)]).detach()


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    denominator: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `KTO_METRICS`."""
    logprobs = counted(logprobs, denominator)
    count, logp, ratio = completion_sums(logprobs, ref_logprobs, mask, cu_seqlens)
    some, good = count > 0, desirable.bool()
    gain = torch.where(good, 1.0, -1.0).to(ratio.dtype) * beta * (ratio - kl)
    weight = torch.where(
        good, ratio.new_tensor(desirable_weight), ratio.new_tensor(undesirable_weight)
    )
    loss = over_denominator((weight * (1 - torch.sigmoid(gain)))[some].sum(), denominator)
    groups = (some & good, some & ~good)
    values = (torch.ones_like(ratio), beta * ratio, logp)
    sums = [value[group].sum() for value in values for group in groups]
    return loss, torch.stack([loss, *sums]).detach()


def completion_sums(
    logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the valid tokens of each completion: count, sum of logprob, sum of logprob - ref."""
    sequences = sequences_of(logprobs, mask, cu_seqlens)
    logp = sequences.clean(logprobs)
    ref = torch.zeros_like(logp) if ref_logprobs is None else sequences.clean(ref_logprobs)
    return sequences.counts(logp.dtype), sequences.sum(logp), sequences.sum(logp - ref)


def _log_odds(x: Tensor) -> Tensor:
    x = x.clamp(max=-(2.0**-24))
    return x - torch.log(-torch.expm1(x))
