"""The structs of csrc/arguments/reward_model_loss.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels._arguments.denominator import DenominatorArguments

# kPairsPerBlock: each has a row of partials
PAIRS_PER_BLOCK = 256


class RewardModelLossArguments(NamedTuple):
    pairs: int
    chosen_scores: Tensor
    rejected_scores: Tensor
    margins: Tensor | None
    mask: Tensor | None
    centering_coef: float
    denominator: DenominatorArguments
    grad_chosen: Tensor | None
    grad_rejected: Tensor | None
    partials: Tensor
    loss: Tensor
    metrics: Tensor


class RankingLossArguments(NamedTuple):
    groups: int
    num_scores: int
    scores: Tensor
    ranks: Tensor
    mask: Tensor | None
    cu_groups: Tensor
    centering_coef: float
    denominator: DenominatorArguments
    grad_scores: Tensor | None
    partials: Tensor
    loss: Tensor
    metrics: Tensor
