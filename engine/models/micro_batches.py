"""What is packed together: micro-batches of a token budget, those that begin alike in one.

`shared`, where a function takes it, is False for a model that reads every sequence in a row of its
own (`model.is_packed`): then nothing is read once for several sequences, and a single item may
exceed the budget by what its sequences share.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from warpo.engine.models.batch import common_prefix, sort_key
from warpo.engine.types import TokenSequence


class Packable(Protocol):
    """What a micro-batch holds whole: a sequence, a pair, an example with its completions."""

    @property
    def sequences(self) -> Sequence[TokenSequence]: ...


T = TypeVar("T", bound=Packable)


class TokenCount:
    """The tokens of some items in one micro-batch.

    Attributes:
        read: of their trie, what several sequences begin with once; of all where it is not shared.
        trained: trained on, which a trie may hold fewer of than sequences share it.
    """

    def __init__(self, *, shared: bool = True) -> None:
        self.read = self.trained = 0
        self._shared = shared
        self._sorted: list[tuple[bytes, int, TokenSequence]] = []

    def with_items(self, items: Iterable[Packable]) -> TokenCount:
        """The count with further items."""
        more = TokenCount(shared=self._shared)
        more.read, more.trained, more._sorted = self.read, self.trained, [*self._sorted]
        for item in items:
            for sequence in item.sequences:
                more._add(sequence)
        return more

    def fits(self, token_budget: int) -> bool:
        return max(self.read, self.trained) <= token_budget

    def _add(self, sequence: TokenSequence) -> None:
        entry = (sort_key(sequence), len(self._sorted), sequence)
        place = bisect_left(self._sorted, entry)
        neighbours = self._sorted[max(0, place - 1) : place + 1]
        ids = sequence.token_ids
        shared = max((common_prefix(ids, other.token_ids) for *_, other in neighbours), default=0)
        self._sorted.insert(place, entry)
        self.read += sequence.num_tokens - shared * self._shared
        self.trained += sequence.num_trained


def split_by_tokens(items: Sequence[T], token_budget: int, *, shared: bool = True) -> list[list[T]]:
    """Micro-batches in the given order, that read and train on at most `token_budget` tokens each.

    Raises:
        ValueError: a single item exceeds the budget.
    """
    parts = _split([[row] for row in range(len(items))], items, token_budget, shared)
    return [[items[row] for row in part] for part in parts]


def split_rows(
    items: Sequence[Packable],
    token_budget: int,
    rows: Iterable[int] | None = None,
    *,
    shared: bool = True,
) -> list[list[int]]:
    """Micro-batches, as of `split_by_tokens`, of the items of these numbers, all if not given.

    Items of one prompt stay together: where they do not fit into what is left of a micro-batch they
    begin a new one, and only those that exceed the budget are parted. Prompts are in the order of
    their longest sequence, as neighbours of one length waste the least where attention pads.
    """
    groups: dict[bytes, list[int]] = {}
    for row in range(len(items)) if rows is None else rows:
        groups.setdefault(_prompt(items[row].sequences[0]), []).append(row)

    def longest(row: int) -> int:
        return max(sequence.num_tokens for sequence in items[row].sequences)

    by_length = [sorted(group, key=longest) for group in groups.values()]
    by_length.sort(key=lambda group: longest(group[-1]))
    return _split(by_length, items, token_budget, shared)


def tokens_read(
    items: Sequence[Packable], micro_batches: Iterable[Sequence[int]], *, shared: bool = True
) -> int:
    """Tokens that a forward pass reads over micro-batches of the items of these numbers."""
    nothing = TokenCount(shared=shared)
    return sum(nothing.with_items(items[row] for row in part).read for part in micro_batches)


def _prompt(sequence: TokenSequence) -> bytes:
    return sequence.token_ids[: sequence.prompt_length].tobytes()


def _split(
    groups: Iterable[Sequence[int]], items: Sequence[Packable], token_budget: int, shared: bool
) -> list[list[int]]:
    micro_batches: list[list[int]] = [[]]
    nothing = count = TokenCount(shared=shared)
    for group in groups:
        together = count.with_items(items[row] for row in group)
        if together.fits(token_budget):
            micro_batches[-1] += group
            count = together
            continue
        if micro_batches[-1]:
            micro_batches.append([])
            count = nothing
        for row in group:
            more = count.with_items([items[row]])
            if not more.fits(token_budget) and micro_batches[-1]:
                micro_batches.append([])
                more = nothing.with_items([items[row]])
            alone = TokenCount().with_items([items[row]])
            if not alone.fits(token_budget):
                raise ValueError(
                    f"a rollout of {alone.read} tokens does not fit a micro-batch of "
                    f"{token_budget}: raise update.token_budget or lower rollout.max_new_tokens"
                )
            micro_batches[-1].append(row)
            count = more
    return [part for part in micro_batches if part]
