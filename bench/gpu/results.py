"""The files of a run on a GPU, to which every program of it appends as it measures.

log.txt      what the programs print
rows.jsonl   one JSON object a line: "row" says what of (step, versions, build, smoke, ncu, test,
             training), the other fields are its own
bench.jsonl  rows of `warpo bench`
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG, ROWS, BENCH = "log.txt", "rows.jsonl", "bench.jsonl"


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, in one write: what was appended stays whole if the program is killed, and lines of
    programs that run side by side do not mix.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(row) + "\n").encode())
    finally:
        os.close(file)


def record(out: Path, row: str, **fields: Any) -> None:
    """Append a row of this kind."""
    append(out / ROWS, {"row": row, **fields})


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; none where there is none. A last line that was cut off is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
