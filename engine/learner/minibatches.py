"""Choice of the rollouts that are packed together, by rows of `StepRollouts`: to be scored, to be
learned from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from warpo.engine.models.batch import order_by_length, split_rows
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import TokenSequence

Minibatch = list[list[int]]
"""The rows of each of its micro-batches."""


def make_minibatches(
    rollouts: StepRollouts, minibatches: int, token_budget: int, seed: int
) -> list[Minibatch]:
    """All rows, dealt at random into minibatches, each of them split by a token budget."""
    rows, sequences = list(range(len(rollouts))), rollouts.sequences
    random.Random(seed).shuffle(rows)
    dealt = [rows[i::minibatches] for i in range(min(minibatches, len(rows)))]
    # Neighbours of one length waste the least in attention, which pads within a micro-batch.
    ordered = [sorted(part, key=lambda row: sequences[row].num_tokens) for part in dealt]
    return [split_rows(sequences, part, token_budget) for part in ordered]


def one_of_each_group(rollouts: StepRollouts) -> list[int]:
    """A row of every group, of each the next one in place; and the longest of all."""
    size = rollouts.group_size
    groups = range(0, len(rollouts), size)
    chosen = [start + i % size for i, start in enumerate(groups)]
    longest = max(range(len(rollouts)), key=lambda row: rollouts.sequences[row].num_tokens)
    return [*chosen, longest]


def tokens_scored(sequences: Sequence[TokenSequence], token_budget: int) -> int:
    """Tokens that a forward pass over sequences reads, each prompt once per micro-batch."""
    total = sum(sequence.num_tokens - sequence.prompt_length for sequence in sequences)
    for rows in order_by_length(sequences, token_budget):
        prompts = {sequences[row].prompt_id: sequences[row].prompt_length for row in rows}
        total += sum(prompts.values())
    return total
