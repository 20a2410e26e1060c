"""Policy losses of `objectives`, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.objectives import Objective


def _segments(lengths_from: Tensor, total: int) -> Tensor:
    """Index of the sequence that each of `total` packed tokens belongs to."""
    return torch.searchsorted(
        lengths_from[1:].long(), torch.arange(total, device=lengths_from.device), right=True
    )


def policy_loss(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    objective: Objective,
    denominator: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `METRICS`. logp `[B, T]`, or `[N]` with cu_seqlens;
    advantages per token.
    """
    if cu_seqlens is None:
        num_sequences = logp.shape[0]
        sequence = (
            torch.arange(num_sequences, device=logp.device)[:, None].expand(logp.shape).reshape(-1)
        )
    else:
        num_sequences = cu_seqlens.numel() - 1
        sequence = _segments(cu_seqlens, logp.numel())
    valid = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.bool()
    valid = valid.reshape(-1)

    def clean(x: Tensor) -> Tensor:
        return torch.where(valid, x.reshape(-1), 0)

    def per_sequence(x: Tensor) -> Tensor:
        return torch.zeros(num_sequences, dtype=x.dtype, device=x.device).index_add(0, sequence, x)

    logp, old, advantages = clean(logp), clean(old), clean(advantages)
    counts = per_sequence(valid.to(logp.dtype))
    limit = objective.log_ratio_limit
    log_ratio = logp - old
    if objective.ratio_level == "sequence":
        log_ratio = (per_sequence(log_ratio) / counts.clamp(min=1))[sequence]
    log_ratio = _bounded(log_ratio, limit)
    ratio = log_ratio.exp()
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    unclipped, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    surrogate = torch.min(unclipped, clipped)

    weight = valid.to(logp.dtype)
    if objective.aggregation == "sequence-mean-token-mean":
        weight = weight / counts.clamp(min=1)[sequence]
    weight = torch.where(denominator > 0, weight / denominator.clamp(min=1e-30), 0)

    kl = torch.zeros_like(logp)
    if objective.kl_coef != 0 and ref is not None:
        kl = torch.where(valid, kl_estimate(logp, clean(ref), objective.kl_estimator, limit), 0)
    policy_part, kl_part = (-surrogate * weight).sum(), (kl * weight).sum()
    with torch.no_grad():
        is_clipped = valid & (clipped < unclipped)
        some = bool(valid.any())
        metrics = torch.stack(
            [
                policy_part,
                kl_part,
                valid.sum().to(logp.dtype),
                (is_clipped & (ratio < low)).sum().to(logp.dtype),
                (is_clipped & (ratio > high)).sum().to(logp.dtype),
                ratio[valid].sum(),
                ratio[valid].min() if some else torch.full_like(policy_part, torch.inf),
                ratio[valid].max() if some else torch.full_like(policy_part, -torch.inf),
                (torch.expm1(log_ratio) - log_ratio)[valid].sum(),
                kl[valid].sum(),
            ]
        )
    return policy_part + objective.kl_coef * kl_part, metrics


def kl_estimate(logp: Tensor, ref: Tensor, estimator: str, limit: float) -> Tensor:
    """k1, k2 or k3 of KL(policy || reference) from samples of the policy,
    http://joschu.net/blog/kl-approx.html.
    """
    difference = ref - logp
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    bounded = _bounded(difference, limit)
    return torch.expm1(bounded) - bounded


def _bounded(x: Tensor, limit: float) -> Tensor:
    """Clamp to +-limit with gradient 0 outside; unlike torch.clamp, NaN keeps its gradient."""
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))
