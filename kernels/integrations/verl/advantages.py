"""Advantages of verl: its reverse scan over tokens, and its loops over the completions of a prompt.

`compute_gdpo_outcome_advantage` calls two functions that are replaced, and is not replaced itself.
Not replaced either: the optimal token baselines, which weigh every step on its own,
`compute_grpo_passk_outcome_advantage`, which needs the two best completions, and
`compute_remax_outcome_advantage`, which is a sum or two of PyTorch already.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.serving import (
    as_flags,
    promoted,
    require,
    require_constant,
    require_served,
)
from warpo.kernels.integrations.verl._library import library

MODULE = "verl.trainer.ppo.core_algos"


@library.replaces("verl.utils.torch_functional", "masked_whiten", "whiten")
def masked_whiten(
    original: Callable, values: Tensor, mask: Tensor, shift_mean: bool = True
) -> Tensor:
    """Differs: NaN in a masked slot stays there, and equal values become exactly 0."""
    require(values.dim() in (1, 2), "values that are not [N] or [B, T]")
    flags = _flags_of_two(mask, values)
    return ops.whiten(values, flags, shift_mean=shift_mean, fill_masked=True).to(values.dtype)


@library.replaces(MODULE, "compute_gae_advantage_return", "gae", "discounted_returns", "whiten")
def compute_gae_advantage_return(
    original: Callable,
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Differs: NaN in a masked slot of the rewards or values stays there."""
    _require_discounts(gamma, lam)
    flags = _flags_of_two(response_mask, token_level_rewards, values)
    advantages = ops.gae(
        token_level_rewards, values, gamma=gamma, gae_lambda=lam, mask=flags
    ).advantages
    # a masked step has the advantage of the next valid one
    advantages = ops.discounted_returns(advantages, gamma=1.0, terminated=flags)
    whitened = ops.whiten(advantages, flags, fill_masked=True)
    dtype = promoted(token_level_rewards, values, response_mask)
    return whitened.to(dtype), (advantages + values).to(dtype)


@library.replaces(
    MODULE, "compute_reinforce_plus_plus_outcome_advantage", "discounted_returns", "whiten"
)
def compute_reinforce_plus_plus_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Differs: NaN in a masked slot of the rewards spreads nowhere."""
    require(config is not None, "no config")
    _require_discounts(config.gamma)
    flags = _flags_of_two(response_mask, token_level_rewards)
    returns = ops.discounted_returns(token_level_rewards, gamma=config.gamma, mask=flags)
    advantages = ops.whiten(returns, flags)
    dtype = promoted(token_level_rewards, response_mask)
    return advantages.to(dtype), returns.to(token_level_rewards.dtype)


@library.replaces(MODULE, "compute_grpo_outcome_advantage", "group_advantages")
def compute_grpo_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Differs: equal rewards have advantage 0, where verl divides a rounding by a rounding."""
    require(epsilon >= 0, "an epsilon below 0")
    groups = _groups(token_level_rewards, response_mask, index)
    advantages = groups.normalised(epsilon) if norm_adv_by_std_in_grpo else groups.centred()
    return _spread(advantages, response_mask, token_level_rewards.dtype)


@library.replaces(MODULE, "compute_grpo_vectorized_outcome_advantage", "group_advantages")
def compute_grpo_vectorized_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Differs: equal rewards have advantage 0, where verl divides a rounding by a rounding."""
    require(epsilon >= 0, "an epsilon below 0")
    groups = _groups(token_level_rewards, response_mask, index)
    require(_is_plain(index), "an index that verl makes other groups of")
    advantages = groups.normalised(epsilon) if norm_adv_by_std_in_grpo else groups.centred()
    return _spread(advantages, response_mask, torch.float32)


@library.replaces(
    MODULE, "compute_reinforce_plus_plus_baseline_outcome_advantage", "group_advantages", "whiten"
)
def compute_reinforce_plus_plus_baseline_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Tensor,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    groups = _groups(token_level_rewards, response_mask, index)
    flags = _flags_of_two(response_mask, token_level_rewards)
    advantages = groups.centred()[:, None].expand(response_mask.shape)
    dtype = promoted(token_level_rewards, response_mask)
    whitened = ops.whiten(advantages, flags).to(dtype)
    return whitened, whitened


@library.replaces(MODULE, "compute_rloo_outcome_advantage", "group_advantages")
def compute_rloo_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    groups = _groups(token_level_rewards, response_mask, index)
    advantages = groups.centred("leave_one_out")
    return _spread(advantages, response_mask, token_level_rewards.dtype)


@library.replaces(MODULE, "compute_rloo_vectorized_outcome_advantage", "group_advantages")
def compute_rloo_vectorized_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    # verl sums others than float32 in float64, and returns that
    require(token_level_rewards.dtype == torch.float32, "rewards that are not float32")
    groups = _groups(token_level_rewards, response_mask, index)
    advantages = groups.centred("leave_one_out", alone=0.0)
    return _spread(advantages, response_mask, torch.float32)


@library.replaces(MODULE, "compute_opo_outcome_advantage", "group_advantages")
def compute_opo_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    groups = _groups(token_level_rewards, response_mask, index)
    lengths = response_mask.sum(dim=-1).float()
    advantages = groups.centred("length_weighted", lengths)
    return _spread(advantages, response_mask, token_level_rewards.dtype)


@library.replaces(MODULE, "compute_gpg_outcome_advantage", "group_advantages")
def compute_gpg_outcome_advantage(
    original: Callable,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """As verl's, which computes alpha: completions over those whose score is not 0."""
    groups = _groups(token_level_rewards, response_mask, index)
    scores = groups.scores
    scale = scores.numel() / scores.count_nonzero().clamp(min=1) / f_norm
    return _spread(groups.centred() * scale, response_mask, token_level_rewards.dtype)


class _Groups(NamedTuple):
    """Completions by prompt.

    Attributes:
        scores: (B,) float32 sums of the rewards of the tokens.
        layout: as `ops.group_advantages` takes it.
        alone: (B,) bool: the only completion of its prompt; None if there is none such.
    """

    scores: Tensor
    layout: dict[str, Any]
    alone: Tensor | None

    def normalised(self, eps: float) -> Tensor:
        """(score - mean) / (std + eps); of one that is alone with mean 0 and std 1."""
        found = ops.group_advantages(self.scores, **self.layout, eps=eps).advantages
        return self._or_alone(found, 1 / (1 + eps))

    def centred(
        self, baseline: str = "mean", lengths: Tensor | None = None, alone: float = 1.0
    ) -> Tensor:
        """score - baseline; of one that is alone its score times `alone`."""
        options = {"std": "none", "baseline": baseline, "lengths": lengths, **self.layout}
        return self._or_alone(ops.group_advantages(self.scores, **options).advantages, alone)

    def _or_alone(self, advantages: Tensor, share: float) -> Tensor:
        if self.alone is None:
            return advantages
        return torch.where(self.alone, share * self.scores, advantages)


def _groups(rewards: Tensor, mask: Tensor, index: Any) -> _Groups:
    require(rewards.dim() == 2 and rewards.shape[0] > 0, "rewards that are not [B, T]")
    require(mask.dim() == 2 and mask.shape[0] == rewards.shape[0], "a mask of another shape")
    of_rows = isinstance(index, np.ndarray) and index.shape == rewards.shape[:1]
    require(of_rows, "an index that is not a NumPy array of one per completion")
    require_served(rewards)
    require_constant(rewards)
    numbers: dict[Any, int] = {}
    ids = np.array([numbers.setdefault(name, len(numbers)) for name in index.tolist()])
    count = len(numbers)
    size, rest = divmod(len(ids), count)
    alone = None
    if rest == 0 and (ids.reshape(count, size) == np.arange(count)[:, None]).all():
        layout: dict[str, Any] = {"group_size": size}
        smallest = size
    else:
        layout = {"group_ids": torch.from_numpy(ids).to(rewards.device), "num_groups": count}
        smallest = np.bincount(ids).min()
    if smallest == 1:
        alone = torch.from_numpy(np.bincount(ids)[ids] == 1).to(rewards.device)
    return _Groups(rewards.sum(dim=-1, dtype=torch.float32), layout, alone)


def _is_plain(index: np.ndarray) -> bool:
    """True if ids are the same for `as_torch_index` of verl where they are equal: it takes strings
    of digits and floats as integers.
    """
    names = index.tolist()
    kinds = set(map(type, names))
    return kinds == {int} or (kinds == {str} and not names[0].strip().lstrip("+-").isdigit())


def _spread(advantages: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give each completion's advantage to all of its tokens; verl gives the same tensor as returns.

    Args:
        dtype: that verl's advantages have before they are multiplied with the mask.
    """
    column = advantages.to(torch.promote_types(dtype, mask.dtype))[:, None]
    # without `out`, a product of two dtypes is one of two copies in the same dtype
    spread = torch.mul(column, mask, out=column.new_empty(mask.shape))
    return spread, spread


def _flags_of_two(mask: Tensor, *tensors: Tensor) -> Tensor:
    """The mask of these tokens; verl refuses to whiten less than two."""
    for tensor in tensors:
        require(tensor.shape == mask.shape, "tensors of two shapes")
    require(mask.device == tensors[0].device, "tensors on two devices")
    require(mask.dtype != torch.float64, "a mask of float64")
    require_served(*tensors)
    require_constant(*tensors)
    flags = as_flags(mask)
    assert flags is not None
    require(int(flags.count_nonzero()) >= 2, "less than two tokens to whiten")
    return flags


def _require_discounts(*values: Any) -> None:
    for value in values:
        is_discount = isinstance(value, (int, float)) and 0 <= value <= 1
        require(is_discount, "gamma or lambda that is no number in [0, 1]")
