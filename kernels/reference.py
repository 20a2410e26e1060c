"""Every operation in plain PyTorch: the definition that all backends are tested against.

Any floating dtype up to float64, differentiable by autograd, no speed intended. Arguments mean what
they mean in `ops`; they are checked there. Masked slots are replaced before any arithmetic, so that
NaN in them reaches neither results nor gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels.objectives import Objective


def logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each `[...]` for logits `[..., V]`, of the distribution softmax(logits /
    temperature).
    """
    vocab = logits.shape[-1]
    valid = targets != ignore_index
    if mask is not None:
        valid = valid & mask.bool()
    inside = (targets >= 0) & (targets < vocab)
    z = torch.where(valid[..., None], logits, 0)
    if isinstance(temperature, Tensor):
        z = z / torch.where(valid, temperature, 1)[..., None]
    else:
        z = z / temperature
    # the maximum is a constant shift: it needs no gradient, and detaching it keeps ties exact
    z = z - z.detach().amax(-1, keepdim=True)
    log_total = z.logsumexp(-1)
    chosen = z.gather(-1, torch.where(valid & inside, targets, 0)[..., None]).squeeze(-1)
    logp = (chosen - log_total).clamp(max=0)
    finite = torch.where(z == -torch.inf, 0, z)
    entropy = log_total - (torch.softmax(z, -1) * finite).sum(-1)
    poisoned = torch.where(inside, 0.0, torch.nan).to(z.dtype)
    return torch.where(valid, logp + poisoned, 0), torch.where(valid, entropy + poisoned, 0)


class GaeOutput(NamedTuple):
    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    *,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
    done_convention: str = "ends_at_t",
    last_terminated: Tensor | None = None,
    last_truncated: Tensor | None = None,
    time_dim: int = -1,
) -> GaeOutput:
    """Generalised advantage estimation by the recursion itself, one step at a time from the
    last.
    """
    rewards, values = rewards.movedim(time_dim, -1), values.movedim(time_dim, -1)

    def ends(flags: Tensor | None, last: Tensor | None) -> Tensor:
        if flags is None:
            return torch.zeros_like(rewards, dtype=torch.bool)
        flags = flags.movedim(time_dim, -1).bool()
        if done_convention == "ends_at_t":
            return flags
        tail = torch.zeros_like(flags[..., :1]) if last is None else last.bool()[..., None]
        return torch.cat([flags[..., 1:], tail], -1)

    terminal, cut = ends(terminated, last_terminated), ends(truncated, last_truncated)
    valid = torch.ones_like(terminal) if mask is None else mask.movedim(time_dim, -1).bool()
    final = None if final_values is None else final_values.movedim(time_dim, -1)
    zero = values.new_zeros(values.shape[:-1])
    next_value = zero if last_values is None else last_values
    next_advantage = zero
    advantages: list[Tensor] = []
    for t in reversed(range(rewards.shape[-1])):
        keep, term = valid[..., t], terminal[..., t]
        value = torch.where(keep, values[..., t], 0)
        reward = torch.where(keep, rewards[..., t], 0)
        bootstrap = next_value
        if final is not None:
            bootstrap = torch.where(cut[..., t] & keep, final[..., t], bootstrap)
        bootstrap = torch.where(term & keep, 0, bootstrap)
        trace = torch.where((term | cut[..., t]) & keep, 0, next_advantage)
        advantage = reward + gamma * bootstrap - value + gamma * gae_lambda * trace
        advantages.append(torch.where(keep, advantage, 0))
        if mask_mode == "carry":
            next_value = torch.where(keep, value, next_value)
            next_advantage = torch.where(keep, advantage, next_advantage)
        else:
            next_value, next_advantage = value, advantage
    stacked = torch.stack(advantages[::-1], -1) if advantages else torch.zeros_like(rewards)
    returns = torch.where(valid, stacked + values, 0)
    return GaeOutput(stacked.movedim(-1, time_dim), returns.movedim(-1, time_dim))


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


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    num_groups: int,
    *,
    std: str = "sample",
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantages [B], mean [groups], std [groups], number of groups whose rewards are all
    equal).
    """
    advantages = torch.zeros_like(rewards)
    means, stds, degenerate = [], [], 0
    for group in range(num_groups):
        members = group_ids == group
        r = rewards[members]
        n = r.numel()
        if n == 0:
            means.append(torch.zeros_like(rewards.sum()))
            stds.append(torch.zeros_like(rewards.sum()))
            continue
        mean = r.mean()
        spread = torch.zeros_like(mean)
        all_equal = bool((r == r[0]).all())
        if not all_equal and std != "none":
            spread = r.std(correction=1 if std == "sample" else 0)
        means.append(r[0] if all_equal else mean)
        stds.append(spread)
        if all_equal:
            degenerate += 1
            continue
        centred = (r - mean) * (n / max(n - 1, 1) if leave_one_out else 1)
        scaled = centred if std == "none" else centred / (spread + eps)
        advantages = advantages.masked_scatter(members, scaled)
    empty = rewards.new_zeros(0)
    return (
        advantages,
        torch.stack(means) if means else empty,
        torch.stack(stds) if stds else empty,
        torch.tensor(degenerate, dtype=torch.int32, device=rewards.device),
    )
