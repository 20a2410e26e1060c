"""Policy losses of `objectives`, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels.objectives import Objective
from warpo.kernels.reference.sequences import (
    Sequences,
    counted,
    over_denominator,
    sequences_of,
)


class Surrogate(NamedTuple):
    """The surrogate of each token, and where each bound is active."""

    value: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor


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
    sampler: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) in the order of `METRICS`. logp `[B, T]`, or `[N]` with cu_seqlens;
    advantages per token. kl_coef is that of the objective if not given; without ref there is no KL.
    """
    logp = counted(logp, denominator)
    tokens = sequences_of(logp, mask, cu_seqlens)
    logp, old, advantages = tokens.clean(logp), tokens.clean(old), tokens.clean(advantages)
    if objective.sequence_mask < torch.inf:
        drawn = old if objective.correction == "none" or sampler is None else tokens.clean(sampler)
        moved = tokens.mean(drawn - logp.detach()) > objective.sequence_mask
        advantages = torch.where(moved & (advantages < 0), 0, advantages)
    limit = objective.log_ratio_limit
    of_tokens = logp - old
    log_ratio, cut_low, cut_high = _log_ratio(objective, tokens, of_tokens, advantages)
    ratio = _bounded(log_ratio, limit).exp()
    surrogate = _surrogate(objective, ratio, logp, advantages)
    correction, corrected = torch.ones_like(logp), torch.zeros_like(tokens.valid)
    if objective.correction != "none" and sampler is not None:
        log_weight = old - tokens.clean(sampler)
        correction, corrected = _correction(objective, tokens, log_weight)

    weight = tokens.valid.to(logp.dtype)
    if objective.aggregation == "sequence-mean-token-mean":
        weight = weight / tokens.spread(tokens.counts(weight.dtype).clamp(min=1))
    weight = over_denominator(weight, denominator)

    kl = torch.zeros_like(logp)
    if ref is not None:
        kl = _kl_term(objective, tokens, tokens.clean(ref) - logp)
        kl = torch.where(tokens.valid, kl, 0)
    entropy = torch.zeros_like(logp) if entropy is None else tokens.clean(entropy)
    policy_part, kl_part, entropy_part = (
        torch.where(denominator == 0, 0, x * weight).sum()
        for x in (-correction * surrogate.value, kl, entropy)
    )
    kl_coef = objective.kl_coef if kl_coef is None else kl_coef
    loss = policy_part + kl_coef * kl_part
    if objective.entropy_coef != 0:
        loss = loss - objective.entropy_coef * entropy_part
    with torch.no_grad():
        metrics = torch.stack(
            [
                policy_part,
                kl_part,
                entropy_part,
                *_token_sums(
                    tokens.valid,
                    surrogate.low | cut_low,
                    surrogate.high | cut_high,
                    surrogate.dual,
                    ratio,
                ),
                *_extremes(ratio[tokens.valid]),
                *_token_sums(
                    tokens.valid,
                    _k3(log_ratio, limit),
                    kl,
                    entropy,
                    correction,
                    corrected,
                    _bounded(of_tokens, limit),
                )[1:],
            ]
        )
    return loss, metrics


def kl_estimate(logp: Tensor, ref: Tensor, estimator: str, limit: float) -> Tensor:
    """k1, k2 or k3 of KL(policy || reference), or the reverse k3 of KL(reference || policy), from
    samples of the policy, http://joschu.net/blog/kl-approx.html; exponents are at most `limit`.
    """
    return _estimate(ref - logp, estimator, limit)


def _estimate(difference: Tensor, estimator: str, limit: float) -> Tensor:
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return (reverse_k3 if estimator == "reverse_k3" else _k3)(difference, limit)


def _log_ratio(
    objective: Objective, tokens: Sequences, log_ratio: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """At the level of the objective; where a bound of "geometric" cut that of the token."""
    cut_low = cut_high = torch.zeros_like(tokens.valid)
    if objective.surrogate == "geometric":
        low, high = _bounds(objective, log_ratio)
        cut_low = (advantages < 0) & (log_ratio < low.log())
        cut_high = ~(advantages < 0) & (log_ratio > high.log())
        log_ratio = torch.where(cut_low, low.log(), torch.where(cut_high, high.log(), log_ratio))
    if objective.ratio_level == "sequence":
        log_ratio = tokens.mean(log_ratio)
    elif objective.ratio_level == "product":
        log_ratio = tokens.spread(tokens.sum(log_ratio))
    elif objective.ratio_level == "prefix":
        log_ratio = tokens.prefix_sum(log_ratio)
    return log_ratio, cut_low & tokens.valid, cut_high & tokens.valid


def _surrogate(objective: Objective, ratio: Tensor, logp: Tensor, advantages: Tensor) -> Surrogate:
    low, high = _bounds(objective, ratio)
    none = torch.zeros_like(ratio, dtype=torch.bool)
    unclipped, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    below, above = ratio < low, ratio > high
    if objective.surrogate in ("clip", "dual_clip"):
        value, is_clipped = torch.min(unclipped, clipped), clipped < unclipped
        floor, is_floor = objective.dual_clip * advantages, none
        if objective.surrogate == "dual_clip":
            is_floor = (advantages < 0) & (value < floor)
        value = torch.where(is_floor, floor, value)
        return Surrogate(value, is_clipped & below, is_clipped & above, is_floor)
    if objective.surrogate == "stop_gradient":
        return Surrogate(clipped.detach() * logp, below, above, none)
    if objective.surrogate == "mask":
        return Surrogate(torch.where(below | above, 0, unclipped), below, above, none)
    if objective.surrogate == "reinforce":
        return Surrogate(advantages * logp, none, none, none)
    if objective.surrogate == "soft_gate":
        tau = torch.full_like(advantages, objective.tau_negative)
        tau = torch.where(advantages > 0, objective.tau_positive, tau)
        gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
        return Surrogate(gate * advantages, none, none, none)
    if objective.surrogate.startswith("divergence"):
        divergence = binary_divergence(objective, logp.detach(), ratio.detach())
        below = (advantages < 0) & (ratio < 1) & (divergence > 1 - low)
        above = (advantages > 0) & (ratio > 1) & (divergence > high - 1)
        return Surrogate(torch.where(below | above, 0, unclipped), below, above, none)
    if objective.surrogate == "gamma":
        return Surrogate(_gamma(objective, ratio, advantages) * advantages * logp, none, none, none)
    return Surrogate(unclipped, none, none, none)


def binary_divergence(objective: Objective, logp: Tensor, ratio: Tensor) -> Tensor:
    """Between the distributions of "this token or another" of the old policy and of this one."""
    logp, old = (x.clamp(max=0) for x in (logp, logp - ratio.log()))
    p, others = logp.exp(), -torch.expm1(logp)
    p_old, others_old = old.exp(), -torch.expm1(old)
    if objective.surrogate == "divergence_tv":
        return (p - p_old).abs()
    of_token = torch.where(p_old > 0, p_old * (old - logp), 0)
    of_others = torch.where(others_old > 0, others_old * (others_old / others).log(), 0)
    return of_token + of_others


def _gamma(objective: Objective, ratio: Tensor, advantages: Tensor) -> Tensor:
    """The weight of the gradient of logp, a constant."""
    o, ratio, negative = objective, ratio.detach(), advantages < 0
    power = torch.where(negative, ratio.new_tensor(o.power_negative), o.power_positive)
    rate = torch.where(negative, ratio.new_tensor(o.rate_negative), o.rate_positive)
    return (power * ratio.log() + rate * (1 - ratio)).exp()


def _correction(
    objective: Objective, tokens: Sequences, log_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight of each token, a constant, and where a bound changed it."""
    if objective.correction_level == "sequence":
        log_weight = tokens.spread(tokens.sum(log_weight))
    weight = _bounded(log_weight, objective.log_ratio_limit).exp().detach()
    low, high = objective.correction_low, objective.correction_high
    outside = (weight < low) | (weight > high)
    replacement = weight.clamp(low, high) if objective.correction == "truncate" else 0
    weight = torch.where(outside, replacement, weight)
    if objective.correction_nan == "mask":
        outside, weight = outside | weight.isnan(), weight.nan_to_num(0)
    return weight, outside


def _kl_term(objective: Objective, tokens: Sequences, difference: Tensor) -> Tensor:
    """difference: ref - logp of the tokens."""
    if objective.kl_level == "sequence":
        difference = tokens.spread(tokens.sum(difference))
    if objective.kl_sampled_from == "reference":
        difference = -difference
    value = _estimate(difference, objective.kl_estimator, objective.log_ratio_limit)
    if objective.kl_gradient == "estimator":
        return value
    k2 = difference.square() / 2
    return k2 + (value - k2).detach()


def _k3(difference: Tensor, limit: float) -> Tensor:
    """Bounded from above only: e^d overflows there."""
    bounded = torch.where(difference > limit, limit, difference)
    return torch.expm1(bounded) - bounded


def reverse_k3(difference: Tensor, limit: float) -> Tensor:
    """r d - (r - 1) with r = e^d."""
    bounded = torch.where(difference > limit, limit, difference)
    bounded = torch.where(bounded < -85, -85, bounded)  # e^-85 is nothing next to 1
    growth = torch.expm1(bounded)
    near = growth * bounded - (growth - bounded)
    return torch.where(bounded.abs() < 0.5, near, (growth + 1) * (bounded - 1) + 1)


def _bounds(objective: Objective, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_tensor(1 - objective.clip_low), like.new_tensor(1 + objective.clip_high)


def _bounded(x: Tensor, limit: float) -> Tensor:
    """Clamp to +-limit with gradient 0 outside; unlike torch.clamp, NaN keeps its gradient."""
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))


def _token_sums(valid: Tensor, *terms: Tensor) -> list[Tensor]:
    """Number of valid tokens, and the sum of each term over them."""
    dtype = next(term.dtype for term in terms if term.is_floating_point())
    return [x.to(dtype)[valid].sum() for x in (valid, *terms)]


def _extremes(ratio: Tensor) -> tuple[Tensor, Tensor]:
    if ratio.numel() == 0:
        return ratio.new_tensor(torch.inf), ratio.new_tensor(-torch.inf)
    return ratio.min(), ratio.max()
