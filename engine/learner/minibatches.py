"""Choice of the rollouts of each optimizer step, and of those that are packed together, by rows of
`StepRollouts`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, pairwise
from typing import TypeVar

from warpo.engine.models.micro_batches import split_rows
from warpo.engine.models.step_rollouts import StepRollouts

Minibatch = list[list[int]]
"""The rows of each of its micro-batches."""

T = TypeVar("T")


def deal(groups: Iterable[Sequence[T]], minibatches: int, seed: int) -> list[list[T]]:
    """Every member of the groups in one of at most `minibatches` parts.

    The groups are put in a random order, and the members of each, and the row that they make is cut
    into parts of one size, give or take one. So groups stay whole where their number is a multiple
    of the parts'; else at most one is parted at each cut, and with fewer groups than parts each
    part holds members of one or two. With groups of one size every member is in every part with the
    same probability: over the deals the mean gradient is that of dealing one by one.
    """
    draw = random.Random(seed)
    shuffled = [draw.sample(group, len(group)) for group in groups]
    draw.shuffle(shuffled)
    members = list(chain.from_iterable(shuffled))
    parts = min(minibatches, len(members))
    cuts = [len(members) * part // parts for part in range(parts + 1)] if parts else []
    return [members[start:stop] for start, stop in pairwise(cuts)]


def make_minibatches(
    rollouts: StepRollouts, minibatches: int, token_budget: int, seed: int, *, shared: bool = True
) -> list[Minibatch]:
    """All rows, dealt into minibatches by groups, each of them split as by `split_rows`."""
    by_group = groupby(range(len(rollouts)), key=rollouts.group_ids.__getitem__)
    dealt = deal([list(group) for _, group in by_group], minibatches, seed)
    return [split_rows(rollouts.sequences, token_budget, rows, shared=shared) for rows in dealt]


def one_of_each_group(rollouts: StepRollouts) -> list[int]:
    """A row of every group, of each the next one in place; and the longest of all."""
    size = rollouts.group_size
    groups = range(0, len(rollouts), size)
    chosen = [start + i % size for i, start in enumerate(groups)]
    longest = max(range(len(rollouts)), key=lambda row: rollouts.sequences[row].num_tokens)
    return [*chosen, longest]
