"""Group-relative advantages, in plain PyTorch."""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    num_groups: int,
    *,
    std: str = "sample",
    baseline: str = "mean",
    lengths: Tensor | None = None,
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
            spread = r.std(correction=0 if std == "population" else 1)
        means.append(r[0] if all_equal else mean)
        stds.append(spread)
        if all_equal:
            degenerate += 1
            continue
        if lengths is None:
            centred = (r - mean) * (n / max(n - 1, 1) if baseline == "leave_one_out" else 1)
        else:
            weights = lengths[members] / lengths[members].sum()
            centred = r - (weights * r).sum()
        if std == "leave_one_out":
            others = _std_of_others(r)
            scaled = torch.where(others == 0, centred, centred / (others + eps))
        else:
            scaled = centred if std == "none" else centred / (spread + eps)
        advantages = advantages.masked_scatter(members, scaled)
    empty = rewards.new_zeros(0)
    return (
        advantages,
        torch.stack(means) if means else empty,
        torch.stack(stds) if stds else empty,
        torch.tensor(degenerate, dtype=torch.int32, device=rewards.device),
    )


def _std_of_others(r: Tensor) -> Tensor:
    """Sample std of the rewards other than each; 0 where they are equal, or fewer than two."""
    stds = []
    for i in range(r.numel()):
        others = torch.cat([r[:i], r[i + 1 :]])
        all_equal = bool((others == others[0]).all())
        stds.append(torch.zeros_like(r[0]) if all_equal else others.std(correction=1))
    return torch.stack(stds)
