"""The findings of `warpo check`, printed as they come."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One finding: a name, a value against its bound, and what to do where it fails."""

    name: str
    text: str
    ok: bool
    cure: str = ""


class Report:
    """Findings, printed as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.lines: list[Line] = []

    def head(self, text: str) -> None:
        self._console.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        text = f"  {'ok  ' if line.ok else 'FAIL'}  {line.name:16}  {line.text}"
        self.say(text)
        if not line.ok and line.cure:
            self.say(f"        {line.cure}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)
