"""`warpo algorithms`: the table of engine/algorithms.py for a terminal, as Markdown, or one row."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from warpo.engine.algorithms import ADVANTAGES, ALGORITHMS, Algorithm

_FAMILIES = {
    "policy": "policy, from sampled completions",
    "supervised": "policy, from given completions",
    "preference": "policy, from given preferences",
    "reward model": "reward models, which then reward a policy",
    "control": "gymnasium environments",
}
_COLUMNS = ("config line", "advantages or loss", "models", "paper")


def print_table(console: Console) -> None:
    """All rows, by family."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, overflow="fold")
    for family, title in _FAMILIES.items():
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in _of(family):
            table.add_row(*_cells(row))
    console.print(table, highlight=False)
    console.print(
        "warpo algorithms NAME          the numbers of a row, and how a config changes them\n"
        "warpo train --help NAME        the settings that there are for it",
        markup=False, highlight=False,
    )  # fmt: skip


def markdown() -> str:
    """The same table for the README."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for family, title in _FAMILIES.items():
        lines.append(f"| **{title}** |" + " |" * (len(_COLUMNS) - 1))
        for row in _of(family):
            line, what, models, _ = _cells(row)
            lines.append(f"| `{line}` | {what} | {models} | [{row.title}]({row.url}) |")
    return "\n".join(lines)


def describe(row: Algorithm) -> str:
    """One row with its numbers and a config to begin with."""
    lines = [f"{row.name}: {row.title}", f"  {row.url}", f"  models: {', '.join(row.models)}"]
    if row.advantages:
        lines.append(f"  advantages: {ADVANTAGES[row.advantages]}")
    if row.loss:
        lines.append(f"  loss: {row.loss}")
    numbers = _changed(row, skip={"name", "family", "title", "url", "trained", "others", "loss"})
    objective: Any = numbers.pop("objective", None)
    numbers.pop("advantages", None)
    if objective is not None:
        kind = type(objective).__name__
        numbers |= {f"{kind}.{name}": v for name, v in _changed(objective, skip=set()).items()}
    lines += [f"  {name}: {value}" for name, value in numbers.items()]
    return "\n".join([*lines, "", f"  examples/{row.name}.yaml is a config to begin with"])


def _of(family: str) -> list[Algorithm]:
    return [row for row in ALGORITHMS.values() if row.family == family]


def _cells(row: Algorithm) -> tuple[str, str, str, str]:
    what = row.loss or ADVANTAGES[row.advantages]
    return f"algorithm: {row.name}", what, ", ".join(row.models), f"{row.title} {row.url}"


def _changed(row: Any, skip: set[str]) -> dict[str, Any]:
    """Fields that differ from their defaults."""
    return {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.init and field.name not in skip and getattr(row, field.name) != field.default
    }
