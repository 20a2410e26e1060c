"""Fields of a row that the reward sources read, checked before a step draws it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence

from warpo.engine.config.reward_kinds import KINDS
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.data.json_lines import Row


def check_fields(sources: Sequence[str]) -> Callable[[Row], None]:
    """Return a check that raises a DataError about a row that one of these sources would fail on.

    Which fields there must be at all, `RewardSources` says: all rows have the same.
    """
    used = {source.kind.name for source in parse_sources(sources)}
    checks: list[Callable[[Row], None]] = [
        pkgutil.resolve_name(kind.row_check)
        for name, kind in reversed(KINDS.items())
        if name in used and kind.row_check
    ]

    def check(row: Row) -> None:
        for check_row in checks:
            check_row(row)

    return check
