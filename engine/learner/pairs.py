"""Right and wrong completions of a prompt as pairs for a preference loss."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, groupby
from typing import NamedTuple

from warpo.engine.config.algorithm import PairChoice
from warpo.engine.learner.minibatches import Minibatch, deal
from warpo.engine.models.micro_batches import split_rows
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import TokenSequence


class Pair(NamedTuple):
    """Two rows of a group, and the sequences of both."""

    chosen: int
    rejected: int
    sequences: tuple[TokenSequence, TokenSequence]


def make_pairs(rollouts: StepRollouts, choice: PairChoice = "ranked") -> list[Pair]:
    """Completions of a group of which the first has the larger reward.

    Args:
        choice: "ranked": best with worst, second best with second worst, and so on: no completion
            is in two pairs, https://arxiv.org/abs/2404.19733 section 2, with rewards instead of
            right and wrong. "extremes": best with worst only, https://arxiv.org/abs/2401.10020.
            "all": each with every worse one, as https://arxiv.org/abs/2203.02155 eq. 1 compares.
    """
    rewards, sequences = rollouts.rewards.tolist(), rollouts.sequences
    pairs = []
    for _, group in groupby(range(len(rollouts)), key=rollouts.group_ids.__getitem__):
        ranked = sorted(group, key=lambda row: -rewards[row])
        for better, worse in _chosen(ranked, choice):
            if rewards[better] > rewards[worse]:
                pairs.append(Pair(better, worse, (sequences[better], sequences[worse])))
    return pairs


def _chosen(ranked: list[int], choice: PairChoice) -> Iterable[tuple[int, int]]:
    """Pairs of a group, best to worst, whatever their rewards."""
    if choice == "all":
        return combinations(ranked, 2)
    if choice == "extremes":
        return [(ranked[0], ranked[-1])]
    half = len(ranked) // 2
    return zip(ranked[:half], reversed(ranked[-half:]), strict=True)


def pair_minibatches(
    rollouts: StepRollouts,
    minibatches: int,
    token_budget: int,
    seed: int,
    *,
    shared: bool = True,
    choice: PairChoice = "ranked",
) -> list[Minibatch]:
    """The pairs of the rollouts, dealt into minibatches by groups, each split as by `split_rows`:
    the chosen completions of a micro-batch, then the rejected ones in the same order. None where
    all completions of every prompt have one reward.
    """
    pairs = make_pairs(rollouts, choice)
    by_group = groupby(pairs, key=lambda pair: rollouts.group_ids[pair.chosen])
    dealt = deal([list(group) for _, group in by_group], minibatches, seed)
    return [
        [
            [part[i].chosen for i in micro] + [part[i].rejected for i in micro]
            for micro in split_rows(part, token_budget, shared=shared)
        ]
        for part in dealt
    ]
