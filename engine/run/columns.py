"""The table of a run: a row per step, as wide as fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the terminal table: the metric, its short and long head, its number format."""

    metric: str
    short: str
    long: str
    form: str


# From the first to the last in the order in which a narrow terminal keeps them.
COLUMNS = (
    Column("step", "step", "step", "d"),
    Column("reward/mean", "reward", "reward", ".4f"),
    Column("reward/accuracy", "acc", "accuracy", ".3f"),
    Column("eval/accuracy", "eval", "eval accuracy", ".3f"),
    Column("reward/degenerate_frac", "equal", "equal groups", ".3f"),
    Column("completion/truncated_frac", "trunc", "truncated", ".3f"),
    Column("completion/length_mean", "length", "length", ".1f"),
    Column("kl/mean", "KL", "KL", ".2e"),
    Column("entropy/mean", "entropy", "entropy", ".4f"),
    Column("perf/step_s", "sec", "seconds", ".1f"),
    Column("ratio/clip_frac", "clip", "clip fraction", ".4f"),
    Column("perf/tokens_per_s", "tok/s", "tokens/s", ".0f"),
)
_HEAD_EVERY_ROWS = 25
# a file or a pipe has no width to fit
_WIDTH_WITHOUT_TERMINAL = 140


class Table:
    """Rows of fixed width, as wide as fits; the head comes again from time to time."""

    def __init__(self, console: Console, columns: Sequence[Column]) -> None:
        width = console.width if console.is_terminal else _WIDTH_WITHOUT_TERMINAL
        long = sum(max(8, len(c.long)) + 2 for c in columns) - 2 <= width
        self._cells: list[tuple[Column, str, int]] = []
        for column in columns:
            head = column.long if long else column.short
            cell = max(8 if long else 6, len(head), 8 if column.form == ".2e" else 0)
            used = sum(size + 1 + long for _, _, size in self._cells)
            if used + cell <= width:
                self._cells.append((column, head, cell))
        self._gap = "  " if long else " "
        self._rows = 0

    def lines(self, row: Mapping[str, float]) -> list[str]:
        """The row, after the head where that is due."""
        body = self._gap.join(
            format(row[column.metric], column.form).rjust(size)
            if column.metric in row
            else " " * size
            for column, _, size in self._cells
        ).rstrip()
        lines = [body]
        if self._rows % _HEAD_EVERY_ROWS == 0:
            head = self._gap.join(head.rjust(size) for _, head, size in self._cells)
            lines = [head, body]
        self._rows += 1
        return lines
