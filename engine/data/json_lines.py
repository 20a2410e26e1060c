"""Lines of JSON objects, read strictly: what JSON does not have, or has twice, is refused."""

from __future__ import annotations

import io
import json
import math
from array import array
from pathlib import Path
from typing import Any

from warpo.engine.errors import DataError

Row = dict[str, Any]
FORMATS = "data is JSONL (one JSON object per line, gzipped or not) or Parquet"
# Deeper values end in a RecursionError wherever they are copied, printed or sent to a process.
MAX_DEPTH = 100
_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """Lines of a file in memory. They are those that were checked, whatever the file becomes."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self._content = path, content
        self._starts, self._lines = array("q"), array("q")
        start = len(_BOM) if content.startswith(_BOM) else 0
        file = io.BytesIO(content)
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                self._starts.append(start)
                self._lines.append(number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> str:
        return str(self._lines[index])

    def read(self, start: int, stop: int) -> list[Row]:
        rows = []
        for index in range(start, stop):
            first = self._starts[index]
            end = self._content.find(b"\n", first)
            line = self._content[first : end if end >= 0 else None]
            try:
                rows.append(_parse_line(line))
            except DataError as error:
                hint = "" if index or line.lstrip()[:1] == b"{" else f"; {FORMATS}"
                raise DataError(f"{self.path}:{self.number(index)}: {error}{hint}") from None
        return rows


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in row if names.count(name) > 1)
        raise DataError(f"the key {twice!r:.60} stands twice in one object: keep one of them")
    return row


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DataError(f"not JSON: {text:.40} is not a finite number: write null, or text")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)


def _parse_line(line: bytes) -> Row:
    try:
        row = _DECODER.decode(str(line, "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 at byte {error.start + 1} of the line: save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"values are nested deeper than {MAX_DEPTH}") from None
    except DataError:
        raise
    except ValueError:  # of int(): Python reads 4300 digits at most
        raise DataError("an integer has more than 4300 digits: write it as text") from None
    if not isinstance(row, dict):
        raise DataError(f"wanted a JSON object, got {type(row).__name__}: {row!r:.60}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        raise DataError(f"values are nested deeper than {MAX_DEPTH}")
    if b"\\u" in line:
        for name, value in row.items():
            _check_surrogates(name, value)
    return row


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _check_surrogates(name: str, value: Any) -> None:
    try:
        json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{ascii(name)[1:-1]:.60} holds half a surrogate pair, \\ud800 to \\udfff: it is not "
            "valid Unicode"
        ) from None
