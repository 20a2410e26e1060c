"""What the sources of a reward read of a row, seen before a step draws it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from warpo.engine.errors import DataError, RewardError
from warpo.engine.json_lines import Row
from warpo.engine.rewards.math import answer_text
from warpo.engine.rewards.sources import parse_sources


def check_fields(sources: Sequence[str]) -> Callable[[Row], None]:
    """What raises a DataError about a row that one of these sources would fail on.

    Which fields there must be at all, `RewardSources` says: all rows have the same.
    """
    kinds = {source.kind for source in parse_sources(sources)}

    def check(row: Row) -> None:
        if "math" in kinds and "answer" in row:
            try:
                answer_text(row["answer"])
            except RewardError as error:
                raise DataError(str(error)) from None
        if "http" in kinds:
            _check_json(row)

    return check


def _check_json(row: Row) -> None:
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError):
        for name, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise DataError(
                    f"reward server: the field {name!r:.60} is no JSON but {type(value).__name__}: "
                    f"{value!r:.60}: write it as text in the data"
                ) from None
        raise
