"""Group-relative advantages of several rewards, each of which is normalised by itself.

    A_ik = (r_ik - mean_k) / (std_k + eps)      within the group of completion i, for each reward k
    A_i  = sum_k w_k A_ik
    A_i  <- (A_i - mean) / (std + eps)          over the whole batch

Of rewards that are summed first, combinations with the same sum have the same advantage, and the
reward of the largest spread decides. The last line keeps the scale whatever their number.

Source: GDPO, https://arxiv.org/abs/2601.05242 section 3.
"""

from typing import Any

import torch
from torch import Tensor

from warpo.kernels._checks import FLOATS, check_no_grad, check_tensor
from warpo.kernels._group_advantages import group_advantages


def decoupled_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    mask: Tensor | None = None,
    std: str = "sample",
    eps: float = 1e-6,
    whiten: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Advantage of each completion from K rewards, normalised apart in its group and then added.

    Args:
        rewards: (B, K) float32 | bfloat16 | float16, K >= 1.
        weights: (K,) float32 of the normalised rewards, on their device; 1 if not given.
        group_size, group_ids, num_groups, mask, std, eps: as in `group_advantages`. The mask is
            that of completions, (B,).
        whiten: the last step, over all B completions that count, with the sample std. Without it
            the sum is the result, to be normalised over several devices for instance.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (B,) float32; 0 where masked.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or a tensor requires grad.

    Source: https://arxiv.org/abs/2601.05242 section 3. Two calls of `group_advantages`; memory
    beyond arguments and result: 8 bytes a reward.
    """
    check_tensor("rewards", rewards, FLOATS)
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must be (B, K) with K >= 1, got {tuple(rewards.shape)}")
    count, kinds = rewards.shape
    check_no_grad("rewards", rewards)
    if weights is not None:
        check_tensor("weights", weights, (torch.float32,), (kinds,), rewards)
        check_no_grad("weights", weights)
    if group_size is not None and (group_size < 1 or count % group_size):
        raise ValueError(f"group_size must divide the number of rows, {count}, got {group_size}")
    options: dict[str, Any] = {"std": std, "eps": eps, "backend": backend}
    if group_ids is not None and num_groups:
        outside = (group_ids < 0) | (group_ids >= num_groups)
        first = num_groups * torch.arange(kinds, device=rewards.device)[:, None]
        ids = torch.where(outside, -1, group_ids + first).flatten()
        where: dict[str, Any] = {"group_ids": ids, "num_groups": kinds * num_groups}
    else:
        where = {"group_size": group_size, "group_ids": group_ids, "num_groups": num_groups}
    every_mask = None if mask is None else mask.expand(kinds, count).flatten()
    found = group_advantages(rewards.t().reshape(-1), **where, mask=every_mask, **options)
    advantages = found.advantages.view(kinds, count)
    total = (advantages if weights is None else weights[:, None] * advantages).sum(0)
    if not whiten or count == 0:
        return total
    return group_advantages(total, count, mask=mask, **options | {"std": "sample"}).advantages
