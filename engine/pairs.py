"""Right and wrong completions of a prompt as pairs for a preference loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from warpo.engine.batch import Batch, Rollout, pack, split_by_tokens


class Pair(NamedTuple):
    """Two completions of one prompt."""

    chosen: Rollout
    rejected: Rollout

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens


def make_pairs(rollouts: Sequence[Rollout]) -> list[Pair]:
    """Best with worst completion of a prompt, second best with second worst, and so on while the
    reward of the first is the larger: no completion is in two pairs.

    Args:
        rollouts: the completions of a prompt follow each other.

    Source: https://arxiv.org/abs/2404.19733 section 2, with rewards in place of right and wrong.
    """
    pairs = []
    for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt_ids):
        ranked = sorted(group, key=lambda rollout: -rollout.reward)
        for best, worst in zip(ranked, reversed(ranked), strict=True):
            if best.reward <= worst.reward:
                break
            pairs.append(Pair(best, worst))
    return pairs


def pair_minibatches(
    rollouts: Sequence[Rollout], minibatches: int, token_budget: int, seed: int
) -> list[list[Batch]]:
    """The pairs of the rollouts, dealt at random into minibatches, each packed by a token budget:
    the chosen completions of a micro-batch, then the rejected ones in the same order. None where
    all completions of every prompt have one reward.
    """
    pairs = make_pairs(rollouts)
    random.Random(seed).shuffle(pairs)
    dealt = [pairs[i::minibatches] for i in range(min(minibatches, len(pairs)))]
    return [
        [
            pack([pair.chosen for pair in micro] + [pair.rejected for pair in micro])
            for micro in split_by_tokens(sorted(part, key=lambda p: p.num_tokens), token_budget)
        ]
        for part in dealt
    ]
