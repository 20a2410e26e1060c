"""Advantages that raise the best of k completions instead of the mean of all.

The reward of k completions to a prompt is the largest of theirs; for rewards of 0 and 1 its
expectation is pass@k. Over all subsets I of k among the n completions of a group:

    pass_at_k_training   A_i = (mean_{I with i} max_I r - mean_I max_I r) / (std_I max_I r + eps)
    pkpo                 A_i = k / n mean_{S without i, |S| = k - 1} max(r_i - max_S r, 0)

With r of 0 and 1 and c of them 1 the first has the mean 1 - C(n - c, k) / C(n, k), and k = 1 is
GRPO. The second is an unbiased estimate of the gradient of E max, less the baseline of least
variance: what completion i adds to k - 1 others.

With rewards in ascending order C(j - 1, k - 1) subsets have their largest at place j, so that one
sort gives all of the sums.

Sources: Pass@k Training, https://arxiv.org/abs/2508.10751 section 2.4; PKPO,
https://arxiv.org/abs/2505.15201 eq. 33.
"""

import torch
from torch import Tensor

from warpo.kernels._checks import FLOATS, check_no_grad, check_number, check_tensor

METHODS = ("pass_at_k_training", "pkpo")


def pass_at_k_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    k: int,
    method: str = "pass_at_k_training",
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each completion for the best of k among the completions to its prompt.

    Args:
        rewards: (B,) float32 | bfloat16 | float16, any stride; any numbers, a constant. A NaN
            stays in its group.
        group_size: n: group g is rewards[g n : (g + 1) n]. B must be a multiple of it.
        k: 1 <= k <= n with "pass_at_k_training", 2 <= k <= n with "pkpo", where k = 1 is
            `group_advantages` with baseline "leave_one_out" and std "none".
        method: "pass_at_k_training" | "pkpo".
        eps: added to the standard deviation, of "pass_at_k_training".

    Returns:
        (B,) float32; exactly 0 in a group in which every k completions, with "pkpo" every k - 1,
            have the same largest reward.

    Raises:
        ValueError: a shape, dtype or option is not as above, or rewards require grad.

    Source: https://arxiv.org/abs/2508.10751 section 2.4, https://arxiv.org/abs/2505.15201 eq. 33.
    Operations of PyTorch in float64 on the device of the rewards, which does not wait for the host.
    """
    _check(rewards, group_size, k, method, eps)
    if rewards.numel() == 0:
        return rewards.float()
    ordered, order = rewards.view(-1, group_size).double().sort(dim=1)
    found = _standardised(ordered, k, eps) if method == METHODS[0] else _marginal(ordered, k)
    return torch.zeros_like(found).scatter(1, order, found).flatten().float()


def _check(rewards: Tensor, group_size: int, k: int, method: str, eps: float) -> None:
    check_tensor("rewards", rewards, FLOATS)
    check_no_grad("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"group_size must divide the number of rewards, {rewards.numel()}, got {group_size}"
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_number("k", k)
    least = 1 if method == METHODS[0] else 2
    if not least <= k <= group_size:
        raise ValueError(
            f"k must be in [{least}, group_size = {group_size}] with method={method!r}, got {k}"
        )
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")


def _standardised(ordered: Tensor, k: int, eps: float) -> Tensor:
    n = ordered.shape[1]
    place = torch.arange(1, n + 1, dtype=torch.float64, device=ordered.device)
    # the probability that the largest of k lies at a place: of any k, of k with the one at it, and
    # of k with one before it
    any_k = _choose(place - 1, k - 1) / _choose(place[-1:], k)
    own = _choose(place - 1, k - 1) / _choose(place[-1:] - 1, k - 1)
    later = _choose(place - 2, k - 2) / _choose(place[-1:] - 1, k - 1)
    centred = ordered - (any_k * ordered).sum(1, keepdim=True)
    std = (any_k * centred.square()).sum(1, keepdim=True).sqrt()
    terms = later * centred
    behind = terms.flip(1).cumsum(1).flip(1) - terms
    all_equal = ordered[:, k - 1 : k] == ordered[:, -1:]
    return torch.where(all_equal, 0, (own * centred + behind) / (std + eps))


def _marginal(ordered: Tensor, k: int) -> Tensor:
    n = ordered.shape[1]
    place = torch.arange(1, n + 1, dtype=torch.float64, device=ordered.device)
    # the probability that the largest of the k - 1 others is at a place before, and at any of them
    at = _choose(place - 1, k - 2) / _choose(place[-1:] - 1, k - 1)
    before = _choose(place - 1, k - 1) / _choose(place[-1:] - 1, k - 1)
    # no k - 1 others have a smaller one as their largest
    above = ordered - ordered[:, k - 2 : k - 1]
    terms = at * above
    return k / n * (before * above - (terms.cumsum(1) - terms))


def _choose(n: Tensor, k: int) -> Tensor:
    """n over k, 0 where it has no meaning; float64, by whose range n and k are bounded."""
    inside = (n >= k) & (n >= 0)
    m = torch.where(inside, n, float(max(k, 0)))
    if k < 0:
        return torch.zeros_like(n)
    logarithm = torch.lgamma(m + 1) - torch.lgamma(m - k + 1) - torch.lgamma(torch.ones_like(m) + k)
    return torch.where(inside, logarithm.exp(), 0)
