"""Packed micro-batches: the trie of some sequences in one row, without padding, each token once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warpo.engine.types import TokenSequence

Segment = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Segments:
    """Start, stop and end of each run of tokens of one subtree_end, in their order, on the host.

    Not the tuple itself, for each length of which torch.compile would make code anew.
    """

    runs: tuple[Segment, ...]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)


@dataclass(kw_only=True, slots=True)
class Batch:
    """One packed micro-batch: N tokens of B sequences in one row, M of them trained on.

    Tokens that several sequences begin with stand in the row once: it is the trie of the sequences,
    in depth-first preorder. A causal model gives a beginning the same hidden states whatever
    follows it. A token may predict several targets.

    Attributes:
        input_ids: (1, N) int64, each token behind those that it follows.
        position_ids: (1, N) int64, place of each token in its sequence.
        gather_index: (B, T) int64, index among the N of each token of each sequence, T the longest
            one; a shorter one ends in repetitions of its last token.
        scatter_index: (N,) int64, where in `gather_index`, flattened, each token is found.
        subtree_end: (N,) int64, the end of the tokens that follow each: token i continues token j,
            and attends to it, where j <= i < subtree_end[j].
        segments: the runs of tokens of one subtree_end.
        logit_positions: (M,) int64, index of the token whose logits predict each trained token.
        targets: (M,) int64, the trained tokens.
        cu_seqlens: (B + 1,) int32, where the trained tokens of each sequence start among the M.
        sequence_tokens: tokens of the sequences, what they share counted in each.
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
    subtree_end: Tensor
    segments: Segments
    logit_positions: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    sequence_tokens: int
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
    def num_tokens(self) -> int:
        """Tokens that a forward pass reads."""
        return self.input_ids.numel()

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


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """One micro-batch of these sequences."""
    order, shared = trie_order(sequences)
    lengths = np.array([sequence.num_tokens for sequence in sequences])
    longest, total = int(lengths.max()), int(lengths.sum() - shared.sum())
    gather_index = np.empty((len(sequences), longest), np.int64)
    input_ids, scatter_index, position_ids, subtree_end = np.empty((4, total), np.int64)
    path, depth, end = np.empty(longest, np.int64), 0, 0
    for number, begin in zip(order, shared.tolist(), strict=True):
        ids = sequences[number].token_ids
        start, length = end, len(ids)
        end += length - begin
        subtree_end[path[begin:depth]] = start
        path[begin:length] = np.arange(start, end)
        input_ids[start:end] = ids[begin:]
        position_ids[start:end] = np.arange(begin, length)
        scatter_index[start:end] = number * longest + position_ids[start:end]
        gather_index[number, :length] = path[:length]
        gather_index[number, length:] = path[length - 1]
        depth = length
    subtree_end[path[:depth]] = end
    spans = [
        (number, start, stop)
        for number, sequence in enumerate(sequences)
        for start, stop in sequence.trained_spans
    ]
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        gather_index=torch.from_numpy(gather_index),
        scatter_index=torch.from_numpy(scatter_index),
        subtree_end=torch.from_numpy(subtree_end),
        segments=_segments(subtree_end),
        logit_positions=_joined([gather_index[i, a - 1 : b - 1] for i, a, b in spans]),
        targets=_joined([sequences[i].token_ids[a:b] for i, a, b in spans]),
        cu_seqlens=torch.from_numpy(starts_of(sequences)).to(torch.int32),
        sequence_tokens=int(lengths.sum()),
    )


def _segments(subtree_end: np.ndarray) -> Segments:
    starts = np.flatnonzero(np.diff(subtree_end, prepend=-1))
    stops = np.append(starts[1:], len(subtree_end))
    runs = np.stack([starts, stops, subtree_end[starts]])
    return Segments(tuple(zip(*runs.tolist(), strict=True)))


def trie_order(sequences: Sequence[TokenSequence]) -> tuple[list[int], np.ndarray]:
    """Sequences by number in the order of their tokens, those that begin with the same ones
    neighbours; and of each in that order how many tokens it shares with the one before, (B,) int64.
    """
    keys = [sort_key(sequence) for sequence in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ordered = [sequences[number].token_ids for number in order]
    shared = [0, *(common_prefix(a, b) for a, b in pairwise(ordered))]
    return order, np.array(shared)


def sort_key(sequence: TokenSequence) -> bytes:
    """Bytes that compare as the tokens do: of each the most significant first."""
    return sequence.token_ids.astype(">u4").tobytes()


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Number of leading ids that two sequences share."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def starts_of(sequences: Sequence[TokenSequence]) -> np.ndarray:
    """(B + 1,) int64: where the trained tokens of each sequence start among all."""
    return np.cumsum([0, *(sequence.num_trained for sequence in sequences)])


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
