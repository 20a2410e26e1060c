"""Warnings where the metrics of a run say that it is surely not learning."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Row = Mapping[str, float]

STEPS = 10
"""Steps in a row that a sign holds before it is told, and steps that are a run's beginning."""
# Relative to the beginning, and in nats per token: what `make train` ends with is 0.3 and 0.05.
_COLLAPSED_SHARE, _COLLAPSED_ENTROPY = 0.05, 0.05
_EXPLODED_KL = 1.0  # nats per token
_SOLVED = 0.9


@dataclass(slots=True)
class _Beginning:
    """Means over the first steps of a run."""

    rewards: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def add(self, row: Row) -> None:
        if len(self.rewards) < STEPS:
            self.rewards.append(row["reward/mean"])
            self.entropies.append(row.get("entropy/mean", 0.0))

    @property
    def reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    @property
    def entropy(self) -> float:
        return sum(self.entropies) / len(self.entropies)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sign:
    """A sign: it is told where it holds in STEPS rows, and `also` in the mean of their rewards."""

    holds: Callable[[Row, _Beginning], bool]
    also: Callable[[float, _Beginning], bool] = lambda reward, beginning: True
    text: Callable[[Row, _Beginning], str]


def _is_equal(row: Row, beginning: _Beginning) -> bool:
    return row.get("reward/degenerate_frac") == 1 or row.get("reward/std") == 0


def _equal_text(row: Row, beginning: _Beginning) -> str:
    of = "each prompt" if row.get("reward/std") else "a step"
    where = f"all completions of {of} got one reward (reward/mean = {row['reward/mean']:.4g})"
    if row.get("reward/accuracy", 0.0) == 1:
        return f"{where}: all are right, which teaches nothing more; take harder prompts"
    return (
        f"{where}, which teaches nothing: look at completions and at what reward.sources make of "
        "them; raise rollout.group_size or rollout.temperature, or take easier prompts"
    )


def _is_truncated(row: Row, beginning: _Beginning) -> bool:
    return row.get("completion/truncated_frac") == 1


def _truncated_text(row: Row, beginning: _Beginning) -> str:
    return (
        "all completions were cut at the length limit (completion/length_mean = "
        f"{row['completion/length_mean']:.4g}): raise rollout.max_new_tokens, and see whether the "
        "model ends its answers at all (its end-of-sequence token, its chat template)"
    )


def _has_collapsed(row: Row, beginning: _Beginning) -> bool:
    entropy = row.get("entropy/mean", 1.0)
    small = entropy < min(_COLLAPSED_ENTROPY, _COLLAPSED_SHARE * beginning.entropy)
    return small and row.get("reward/accuracy", 0.0) < _SOLVED


def _collapsed_text(row: Row, beginning: _Beginning) -> str:
    return (
        f"entropy/mean = {row['entropy/mean']:.2g} nats per token, {beginning.entropy:.2g} at the "
        "beginning: completions of a prompt are nearly all alike; lower update.lr, or set "
        "loss.entropy_coef or a higher upper loss.clip_range"
    )


def _has_exploded(row: Row, beginning: _Beginning) -> bool:
    return "kl/mean" in row and not row["kl/mean"] <= _EXPLODED_KL


def _exploded_text(row: Row, beginning: _Beginning) -> str:
    return (
        f"kl/mean = {row['kl/mean']:.3g} nats per token, and reward/mean = "
        f"{row['reward/mean']:.4g} is not above the {beginning.reward:.4g} of the beginning: look "
        "at completions; go back to an earlier checkpoint with a lower update.lr or a higher "
        "loss.kl_coef"
    )


_SIGNS = {
    "equal": _Sign(holds=_is_equal, text=_equal_text),
    "truncated": _Sign(holds=_is_truncated, text=_truncated_text),
    "collapsed": _Sign(holds=_has_collapsed, text=_collapsed_text),
    "exploded": _Sign(
        holds=_has_exploded,
        also=lambda reward, beginning: reward <= beginning.reward,
        text=_exploded_text,
    ),
}


class Watch:
    """Reads the rows of a run; says each kind of warning once."""

    def __init__(self) -> None:
        self._beginning = _Beginning()
        self._rewards: deque[float] = deque(maxlen=STEPS)
        self._held: dict[str, tuple[int, int]] = {}  # since which step, in how many rows
        self._told: set[str] = set()

    def take(self, row: Row) -> None:
        """Take in the row of a step; those without rewards, such as evaluations, tell nothing."""
        if "reward/mean" not in row:
            return
        self._beginning.add(row)
        self._rewards.append(row["reward/mean"])
        for name, sign in _SIGNS.items():
            since, rows = self._held.pop(name, (int(row["step"]), 0))
            if sign.holds(row, self._beginning):
                self._held[name] = since, rows + 1

    def warnings(self, row: Row) -> list[str]:
        """Take in the row of a step; the warnings that are due after it, a line each."""
        self.take(row)
        found = []
        for name, (since, rows) in self._held.items():
            sign = _SIGNS[name]
            if name in self._told or rows < STEPS:
                continue
            if sign.also(sum(self._rewards) / len(self._rewards), self._beginning):
                self._told.add(name)
                found.append(f"warning: since step {since} {sign.text(row, self._beginning)}")
        return found
