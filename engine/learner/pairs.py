"""Right and wrong completions of a prompt as pairs for a preference loss."""

from __future__ import annotations

import random
from itertools import groupby
from typing import NamedTuple

from warpo.engine.learner.minibatches import Minibatch
from warpo.engine.models.batch import split_by_tokens
from warpo.engine.models.step_rollouts import StepRollouts


class Pair(NamedTuple):
    """Two rows of a group, and the tokens of both."""

    chosen: int
    rejected: int
    num_tokens: int


def make_pairs(rollouts: StepRollouts) -> list[Pair]:
    """Best with worst completion of a group, second best with second worst, and so on while the
    reward of the first is the larger: no completion is in two pairs.

    Source: https://arxiv.org/abs/2404.19733 section 2, with rewards instead of right and wrong.
    """
    rewards, sequences = rollouts.rewards.tolist(), rollouts.sequences
    pairs = []
    for _, group in groupby(range(len(rollouts)), key=rollouts.group_ids.__getitem__):
        ranked = sorted(group, key=lambda row: -rewards[row])
        for best, worst in zip(ranked, reversed(ranked), strict=True):
            if rewards[best] <= rewards[worst]:
                break
            num_tokens = sequences[best].num_tokens + sequences[worst].num_tokens
            pairs.append(Pair(best, worst, num_tokens))
    return pairs


def pair_minibatches(
    rollouts: StepRollouts, minibatches: int, token_budget: int, seed: int
) -> list[Minibatch]:
    """The pairs of the rollouts, dealt at random into minibatches, each split by a token budget:
    the chosen completions of a micro-batch, then the rejected ones in the same order. None where
    all completions of every prompt have one reward.
    """
    pairs = make_pairs(rollouts)
    random.Random(seed).shuffle(pairs)
    dealt = [pairs[i::minibatches] for i in range(min(minibatches, len(pairs)))]
    return [
        [
            [pair.chosen for pair in micro] + [pair.rejected for pair in micro]
            for micro in split_by_tokens(sorted(part, key=lambda p: p.num_tokens), token_budget)
        ]
        for part in dealt
    ]
