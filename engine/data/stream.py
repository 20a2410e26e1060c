"""The order in which rows are drawn. It hangs on what a row says, not on where it stands, so a run
that is resumed may lose rows and gain others, and draws the rest as it would have.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from warpo.engine.data.json_lines import Row
from warpo.engine.errors import CheckpointError

T = TypeVar("T")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RowKeys:
    """Two hashes of each row of a data set, in its order: of its prompt, or the field `lead`, and
    of all its fields.
    """

    def __init__(self, fields: Sequence[str], lead: str = "prompt") -> None:
        self._fields, self._lead = sorted(fields), lead
        self._numbers = array("q")

    def append(self, row: Row) -> None:
        self._numbers.append(_digest(row[self._lead]))
        self._numbers.append(_digest([row[name] for name in self._fields]))

    def tensor(self) -> Tensor:
        """(rows, 2) int64."""
        numbers = np.frombuffer(self._numbers, dtype=np.int64).reshape(-1, 2)
        return torch.from_numpy(numbers.copy())


def _digest(value: Any) -> int:
    return int.from_bytes(
        blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True
    )


def draw_keys(keys: Tensor) -> np.ndarray:
    """A number for each row, uint64: a hash of its prompt and of how many rows before have it."""
    return _copies(keys[:, 0].numpy())


def random_keys(numbers: np.ndarray, *entropy: int) -> np.ndarray:
    """A random number for each of these, uint64, that only it and `entropy` determine."""
    (word,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return _mix(numbers ^ word)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The end of SplitMix64 (https://doi.org/10.1145/2660193.2660195)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _copies(numbers: np.ndarray) -> np.ndarray:
    """The numbers made different: the first, second, ... copy of each, hashed."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.zeros(0, bool)
    starts = np.flatnonzero(new)
    copy = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    unique = np.empty(len(numbers), np.uint64)
    unique[order] = _mix(ordered.view(np.uint64) + copy.astype(np.uint64) * _GOLDEN)
    return unique


class RowRecord:
    """The rows of a run's data, kept in its checkpoints.

    Attributes:
        name: the setting that names the data.
        changes: how the rows differ from those of the checkpoint that was loaded, in a line; empty
            where they do not.
    """

    def __init__(self, name: str, keys: Tensor) -> None:
        self.name, self.changes, self._keys = name, "", keys

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self._keys}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Compare the rows with those of `state`.

        Raises:
            CheckpointError: they have no prompt in common.
        """
        saved = state["rows"]
        if saved is self._keys or torch.equal(saved, self._keys):
            return
        gone, new, changed = _differences(saved.numpy(), self._keys.numpy())
        if gone == len(saved):
            raise CheckpointError(
                f"{self.name} has none of the {len(saved)} prompts that the checkpoint was trained "
                "on: restore the data, or start without --resume"
            )
        same = len(saved) - gone - changed
        self.changes = (
            f"{self.name} is not what the checkpoint was trained on: {gone} rows are gone, {new} "
            f"are new, {changed} have their prompt and other fields, {same} are as they were"
        )


def _differences(old: np.ndarray, new: np.ndarray) -> tuple[int, int, int]:
    """Count rows that are gone, that are new, and that have their prompt but other fields."""
    old_rows, new_rows = _copies(old[:, 1]), _copies(new[:, 1])
    left = _copies(old[~np.isin(old_rows, new_rows), 0].copy())
    come = _copies(new[~np.isin(new_rows, old_rows), 0].copy())
    changed = int(np.isin(left, come).sum())
    return len(left) - changed, len(come) - changed, changed


class PromptStream(Generic[T]):
    """Prompts, or examples, in an endless order that is drawn anew in every epoch.

    Every epoch draws each once. A batch may span two epochs, so none is short. Which comes before
    which is determined only by seed, epoch and the two of them.

    Args:
        keys: keys of `items`, as `RowKeys` makes them.
    """

    def __init__(
        self,
        items: Sequence[T],
        keys: Tensor,
        items_per_step: int,
        seed: int,
        name: str = "data.train",
    ) -> None:
        self._items, self._items_per_step, self._seed = items, items_per_step, seed
        self._record = RowRecord(name, keys)
        self._numbers = draw_keys(keys)
        self._begin(0)

    def next(self) -> list[T]:
        """The next `items_per_step`."""
        return [self._draw() for _ in range(self._items_per_step)]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._place / len(self._items)

    @property
    def changes(self) -> str:
        """Describe how the rows differ from those of the checkpoint that was loaded."""
        return self._record.changes

    def _begin(self, epoch: int) -> None:
        found = random_keys(self._numbers, self._seed, epoch + 1)
        order = np.argsort(found, kind="stable")
        self._epoch, self._place, self._order, self._ranks = epoch, 0, order, found[order]

    def _draw(self) -> T:
        if self._place == len(self._items):
            self._begin(self._epoch + 1)
        self._place += 1
        return self._items[int(self._order[self._place - 1])]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream: the epoch, and the rank of the last draw in it."""
        last = int(self._ranks[self._place - 1]) if self._place else -1
        state = {"seed": self._seed, "epoch": self._epoch, "last": last}
        return state | self._record.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with the rows that there are.

        Raises:
            CheckpointError: the seed is another, or all rows are.
        """
        if state["seed"] != self._seed:
            raise CheckpointError(
                f"the checkpoint drew its prompts with seed {state['seed']}, this run has seed "
                f"{self._seed}: the order would change; set seed to {state['seed']}"
            )
        self._record.load_state_dict(state)
        if state["epoch"] != self._epoch:
            self._begin(state["epoch"])
        last = state["last"]
        self._place = (
            int(np.searchsorted(self._ranks, np.uint64(last), "right")) if last >= 0 else 0
        )
