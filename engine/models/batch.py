"""Packed micro-batches: sequences of tokens in one row, without padding and each prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from warpo.engine.types import TokenSequence


@dataclass(kw_only=True, slots=True)
class Batch:
    """One packed micro-batch: N tokens of B sequences in one row, M of them trained on.

    Sequences with the same prompt share its tokens: the row holds each prompt once. A causal model
    gives a prompt the same hidden states whatever follows it.

    Attributes:
        input_ids: (1, N) int64, what follows a prompt somewhere behind it.
        position_ids: (1, N) int64, place of each token in its sequence.
        gather_index: (B, T) int64, index among the N of each token of each sequence, T the longest
            one; a shorter one ends in repetitions of its last token.
        scatter_index: (N,) int64, where in `gather_index`, flattened, each token is found.
        logit_positions: (M,) int64, index of the token whose logits predict each trained token.
        targets: (M,) int64, the trained tokens.
        cu_seqlens: (B + 1,) int32, where the trained tokens of each sequence start among the M.
        sampler_logprobs: (M,) float32, as the sampler computed them.
        old_logprobs: (M,) float32, of the policy when the step began, the sampler's or the
            learner's.
        ref_logprobs, values, advantages, returns: (M,) float32.
        right: (M,) bool, tokens of completions that count as right.
        token_index: (M,) int64, number of each trained token among those of the step.
        penalized: (M,) bool, tokens that pay a KL to the old policy.

    What a loss does not read is None.
    """

    input_ids: Tensor
    position_ids: Tensor
    gather_index: Tensor
    scatter_index: Tensor
    logit_positions: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    right: Tensor | None = None
    token_index: Tensor | None = None
    penalized: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_trained(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        tensors: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


class _Row:
    """The row of a micro-batch as it grows, a stretch of tokens at a time."""

    def __init__(self) -> None:
        self.length = 0
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.places: list[np.ndarray] = []

    def append(self, ids: np.ndarray, position: int, place: int) -> np.ndarray:
        """Add tokens that begin at `position` of their sequence and at `place` of the gather index;
        returns their indices in the row.
        """
        count = np.arange(len(ids))
        self.ids.append(ids)
        self.positions.append(position + count)
        self.places.append(place + count)
        index = self.length + count
        self.length += len(ids)
        return index


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """One micro-batch of these sequences."""
    longest = max(sequence.num_tokens for sequence in sequences)
    gather_index = np.empty((len(sequences), longest), np.int64)
    row, prompts = _Row(), dict[int, np.ndarray]()
    logit_positions, targets = [], []
    for number, sequence in enumerate(sequences):
        ids, shared, place = sequence.token_ids, sequence.prompt_length, number * longest
        if sequence.prompt_id not in prompts:
            prompts[sequence.prompt_id] = row.append(ids[:shared], 0, place)
        prompt = prompts[sequence.prompt_id]
        assert len(prompt) == shared, f"two prompts with prompt_id {sequence.prompt_id}"
        index = np.concatenate([prompt, row.append(ids[shared:], shared, place + shared)])
        gather_index[number, : len(index)] = index
        gather_index[number, len(index) :] = index[-1]
        for start, stop in sequence.trained_spans:
            logit_positions.append(index[start - 1 : stop - 1])
            targets.append(ids[start:stop])
    return Batch(
        input_ids=_joined(row.ids)[None],
        position_ids=_joined(row.positions)[None],
        gather_index=torch.from_numpy(gather_index),
        scatter_index=_joined(row.places),
        logit_positions=_joined(logit_positions),
        targets=_joined(targets),
        cu_seqlens=torch.from_numpy(starts_of(sequences)).to(torch.int32),
    )


def starts_of(sequences: Sequence[TokenSequence]) -> np.ndarray:
    """(B + 1,) int64: where the trained tokens of each sequence start among all."""
    return np.cumsum([0, *(sequence.num_trained for sequence in sequences)])


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


class HasLength(Protocol):
    """A sequence, or an example with all its completions."""

    @property
    def num_tokens(self) -> int: ...


T = TypeVar("T", bound=HasLength)


def split_by_tokens(items: Sequence[T], token_budget: int) -> list[list[T]]:
    """Micro-batches of at most `token_budget` tokens each, in the given order.

    Raises:
        ValueError: a single one exceeds the budget.
    """
    micro_batches: list[list[T]] = []
    room = 0
    for item in items:
        if item.num_tokens > token_budget:
            raise ValueError(
                f"a rollout of {item.num_tokens} tokens does not fit a micro-batch of "
                f"{token_budget}: raise update.token_budget or lower rollout.max_new_tokens"
            )
        if item.num_tokens > room:
            micro_batches.append([])
            room = token_budget
        micro_batches[-1].append(item)
        room -= item.num_tokens
    return micro_batches


def split_rows(
    items: Sequence[HasLength], rows: Sequence[int], token_budget: int
) -> list[list[int]]:
    """Micro-batches, as of `split_by_tokens`, of the items of these numbers, by their numbers."""
    remaining = iter(rows)
    parts = split_by_tokens([items[row] for row in rows], token_budget)
    return [list(islice(remaining, len(part))) for part in parts]


def order_by_length(items: Sequence[HasLength], token_budget: int) -> list[list[int]]:
    """Micro-batches of all items by their numbers: neighbours of one length, which waste the least
    in attention, since it pads within a micro-batch.
    """
    order = sorted(range(len(items)), key=lambda row: items[row].num_tokens)
    return split_rows(items, order, token_budget)
