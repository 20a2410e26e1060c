"""Losses of a reward model, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.sequences import counted, mean_and_m2, over_denominator

logsigmoid = torch.nn.functional.logsigmoid


def reward_model_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    denominator: Tensor,
    *,
    margins: Tensor | None = None,
    mask: Tensor | None = None,
    centering_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `REWARD_METRICS`, of pairs `[B]`."""
    valid = torch.ones_like(chosen_scores, dtype=torch.bool) if mask is None else mask.bool()
    chosen, rejected = (counted(x, denominator)[valid] for x in (chosen_scores, rejected_scores))
    margins = torch.zeros_like(chosen) if margins is None else margins[valid]
    terms = _pair_loss(chosen, rejected, margins, centering_coef)
    loss = over_denominator(terms.sum(), denominator)
    return loss, _metrics(loss, chosen, rejected, torch.cat([chosen, rejected]))


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor,
    denominator: Tensor,
    *,
    mask: Tensor | None = None,
    centering_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `REWARD_METRICS`, of groups of ranked scores."""
    scores = counted(scores, denominator)
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    total, better, worse, kept = torch.where(valid, scores, 0).sum() * 0, [], [], []
    bounds = cu_groups.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        s, r = (x[first:last][valid[first:last]] for x in (scores, ranks))
        i, j = torch.nonzero(r[:, None] < r[None, :], as_tuple=True)
        pairs = max(s.numel() * (s.numel() - 1) // 2, 1)
        total = total + _pair_loss(s[i], s[j], torch.zeros_like(s[i]), centering_coef).sum() / pairs
        better.append(s[i])
        worse.append(s[j])
        kept.append(s)
    loss = over_denominator(total, denominator)
    empty = [scores.new_zeros(0)]
    return loss, _metrics(loss, *(torch.cat(x + empty) for x in (better, worse, kept)))


def _pair_loss(better: Tensor, worse: Tensor, margins: Tensor, centering_coef: float) -> Tensor:
    return -logsigmoid(better - worse - margins) + centering_coef * (better + worse).square()


def _metrics(loss: Tensor, better: Tensor, worse: Tensor, scores: Tensor) -> Tensor:
    numbers = (better.numel(), (better > worse).sum(), (better - worse).sum(), scores.numel())
    moments = mean_and_m2(scores)
    with torch.no_grad():
        return torch.stack([torch.as_tensor(x).to(loss) for x in (loss, *numbers, *moments)])
