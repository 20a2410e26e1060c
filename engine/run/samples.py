"""Completions as a terminal shows them: a few lines, without control characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, chop_cells, get_character_cell_size

PROMPT_LINES, COMPLETION_LINES = 2, 4
_CUT = " ... "
_INDENT = "  "


def describe(
    title: str, prompt: str, samples: Sequence[tuple[float, str]], width: int, encoding: str
) -> list[str]:
    """A title, the end of a prompt, and completions, each after its reward.

    Args:
        samples: (reward, completion) of each.
        width: cells of a line.
        encoding: of the terminal; what it lacks is escaped.
    """
    labels = ["prompt", *(f"reward {reward:.4g}" for reward, _ in samples)]
    size = max(map(len, labels))
    room = max(20, width - len(_INDENT) - size - 2)
    parts = [_end(printable(prompt, encoding), PROMPT_LINES * room)]
    parts += [_ends(printable(text, encoding), COMPLETION_LINES * room) for _, text in samples]
    lines = [title]
    for label, part in zip(labels, parts, strict=True):
        for i, line in enumerate(chop_cells(part, room) or [""]):
            lines.append(f"{_INDENT}{('' if i else label).ljust(size)}  {line}")
    return lines


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""A text in one line: "\n", "\x1b" and the like for what moves the cursor, changes colours or
    the direction of writing, or has no sign of its own, and for what the encoding lacks.
    """
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _ends(text: str, room: int) -> str:
    """The text, or three quarters of the room of its beginning and the rest of its end."""
    if cell_len(text) <= room:
        return text
    head = 3 * room // 4
    return _taken(text, head) + _end(text, room - head)


def _end(text: str, room: int) -> str:
    """The text, or its end after a mark."""
    if cell_len(text) <= room:
        return text
    return _CUT.lstrip() + _taken(reversed(text), room - len(_CUT))[::-1]


def _taken(chars: Iterable[str], room: int) -> str:
    """As many of the characters as the room has cells for."""
    found: list[str] = []
    for char in chars:
        room -= get_character_cell_size(char)
        if room < 0:
            break
        found.append(char)
    return "".join(found)
