"""Scores that a reward source returns, checked: a number per completion, or scores of steps."""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from warpo.engine.errors import RewardError

# (end, score) of each step. `end` is the number of characters of the completion up to the end of
# the step; as a `RewardSource` gives it, the index of the token that the step ends with.
Steps = list[tuple[int, float]]

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The scores of completions by one source.

    Attributes:
        scores: an entry for each completion.
        failed: places of the completions that could not be scored, and so have 0.
        retries: calls that were made again.
        notes: a line about each failure, or about many of one kind.
    """

    scores: list[float] | list[Steps]
    failed: set[int] = field(default_factory=set)
    retries: int = 0
    notes: list[str] = field(default_factory=list)


def parse_scores(scores: Any, completions: Sequence[str]) -> list[float] | list[Steps]:
    """The scores as plain numbers.

    Args:
        scores: one entry for each completion, all numbers or all lists of [end, score]. The ends of
            a list rise, the last is at most the length of the completion.

    Raises:
        RewardError: they are anything else, or not finite; names the completion.
    """
    wanted = f"must return a list of {len(completions)} numbers or lists of [end, score]"
    if isinstance(scores, (str, bytes, Mapping, set)) or not hasattr(scores, "__len__"):
        raise RewardError(f"{wanted}, returned {type(scores).__name__}: {shown(scores)}")
    if len(scores) != len(completions):
        raise RewardError(f"{wanted}, one for each completion, returned {len(scores)}")
    places = [functools.partial(_place, i, text) for i, text in enumerate(completions)]
    kinds = [isinstance(entry, (list, tuple)) for entry in scores]
    if any(kinds) and not all(kinds):
        raise RewardError(f"{wanted}, returned both: a number {places[kinds.index(False)]()}")
    if any(kinds):
        return [
            _steps(steps, text, place)
            for steps, text, place in zip(scores, completions, places, strict=True)
        ]
    for score, place in zip(scores, places, strict=True):
        if not hasattr(score, "__float__"):
            raise RewardError(f"{wanted}, returned {shown(score)} {place()}")
    return [_finite(score, place) for score, place in zip(scores, places, strict=True)]


def _place(index: int, text: str) -> str:
    return f"for completion {index}, {text!r:.80}"


def shown(value: Any) -> str:
    """The value for a message: 80 characters of it at most, however large it is."""
    try:
        return f"{_shortened.repr(value):.80}"
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return f"a {type(value).__name__} of too many digits"


def _finite(score: Any, place: Callable[[], str]) -> float:
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"returned {number} {place()}: rewards must be finite")
    return number


def _steps(entries: Sequence[Any], text: str, place: Callable[[], str]) -> Steps:
    steps: Steps = []
    for entry in entries:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 2
            and hasattr(entry[0], "__index__")
            and hasattr(entry[1], "__float__")
        ):
            raise RewardError(f"returned the step {shown(entry)} {place()}: wanted [end, score]")
        end, lowest = int(entry[0]), steps[-1][0] + 1 if steps else min(1, len(text))
        if not lowest <= end <= len(text):
            raise RewardError(
                f"returned the step {shown(entry)} {place()}: its end must be in {lowest} to "
                f"{len(text)}, the characters of the completion up to the end of the step"
            )
        steps.append((end, _finite(entry[1], place)))
    return steps
