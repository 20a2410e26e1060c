"""Launches of the Triton kernels of reward_model_loss and ranking_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.reward_model_loss import (
    PAIRS_PER_BLOCK,
    RankingLossArguments,
    RewardModelLossArguments,
)
from warpo.kernels._reward_model_loss import REWARD_METRICS

Launch = tuple[str, Callable[[], None]]


def reward_model_loss(dtype: torch.dtype, margins: bool, mask: bool, pairs: int = 9) -> None:
    from warpo.kernels import _triton

    scores, scalar, grad = torch.empty(pairs, dtype=dtype), torch.empty(()), torch.empty(pairs)
    arguments = RewardModelLossArguments(
        pairs=pairs,
        chosen_scores=scores,
        rejected_scores=scores,
        margins=scores if margins else None,
        mask=flags(scores, mask),
        centering_coef=1 / pairs,
        denominator=DenominatorArguments(0.0, scalar),
        grad_chosen=grad,
        grad_rejected=grad,
        partials=torch.empty(-(-pairs // PAIRS_PER_BLOCK), len(REWARD_METRICS)),
        loss=scalar,
        metrics=torch.empty(len(REWARD_METRICS)),
    )
    _triton.reward_model_loss(arguments)


def ranking_loss(dtype: torch.dtype, mask: bool, groups: int = 4) -> None:
    from warpo.kernels import _triton

    scores, scalar = torch.empty(4 * groups, dtype=dtype), torch.empty(())
    arguments = RankingLossArguments(
        groups=groups,
        num_scores=4 * groups,
        scores=scores,
        ranks=torch.empty(4 * groups, dtype=torch.int64),
        mask=flags(scores, mask),
        cu_groups=torch.zeros(groups + 1, dtype=torch.int32),
        centering_coef=1 / groups,
        denominator=DenominatorArguments(0.0, scalar),
        grad_scores=torch.empty(4 * groups),
        partials=torch.empty(groups, len(REWARD_METRICS)),
        loss=scalar,
        metrics=torch.empty(len(REWARD_METRICS)),
    )
    _triton.ranking_loss(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "margins mask", partial(reward_model_loss, torch.bfloat16, True, True)
    yield "mask", partial(ranking_loss, torch.bfloat16, True)
    if all_of_them:
        yield "plain", partial(reward_model_loss, torch.float32, False, False)
        yield "plain", partial(ranking_loss, torch.float32, False)


def variations() -> Iterator[Callable[[], None]]:
    for number in (1, 2, 16, 300):
        yield partial(reward_model_loss, torch.bfloat16, True, True, number)
        yield partial(ranking_loss, torch.float32, False, number)
