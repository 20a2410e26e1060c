"""The rows of a data set on disk, checked: JSONL, Parquet, or a folder of Hugging Face datasets.

What a path is, is seen from what lies there:

    a file that begins with PAR1               Parquet
    any other file                             JSONL, one object a line
    a folder with dataset_info.json            a data set that `datasets` saved (save_to_disk)
    any other folder                           its *.parquet files, in the order of their names

A row is called by the line of its file, or by its number from 0 in the other three.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warpo.engine.errors import DataError

Row = dict[str, Any]
# datasets and the hub write the shards of a split so: train-00000-of-00002.parquet
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.parquet")


def read_rows(path: Path, required: Sequence[str]) -> list[tuple[str, Row]]:
    """(place, fields) of each row; all rows have the same fields, `required` among them.

    A place is "FILE:LINE" or "PATH: row NUMBER".

    Raises:
        DataError: the data cannot be read, or a row is not usable; names place, field, reason.
    """
    try:
        rows = _read(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path}: the file is empty, wanted one JSON object a line, or rows")
    first_place, first = rows[0]
    for place, row in rows:
        _check_fields(place, row, required, first, _without(path, first_place))
    return rows


def _read(path: Path) -> list[tuple[str, Row]]:
    if not path.is_dir():
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        return _read_parquet([path]) if is_parquet else _read_jsonl(path)
    if (path / "dataset_info.json").exists():
        return _numbered(path, _read_dataset(path))
    if (path / "dataset_dict.json").exists():
        names = ", ".join(sorted(p.parent.name for p in path.glob("*/dataset_info.json")))
        raise DataError(f"{path} holds several splits ({names}): name the folder of one of them")
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(
            f"{path} is a folder with neither a data set of `datasets` (dataset_info.json) nor "
            "*.parquet files"
        )
    splits = sorted({match[1] for file in files if (match := _SHARD.fullmatch(file.name))})
    if len(splits) > 1:
        raise DataError(
            f"{path} holds the Parquet files of several splits ({', '.join(splits)}): put those of "
            "one into a folder of their own"
        )
    return _read_parquet(files)


def _numbered(path: Path, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows)]


def _without(path: Path, place: str) -> str:
    """The place as it is called within its file: "line 3" or "row 2"."""
    number = place.removeprefix(f"{path}:")
    return f"line {number}" if number.isdecimal() else number.strip()


def _read_parquet(files: Sequence[Path]) -> list[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    rows = []
    for path in files:
        try:
            rows += _numbered(path, pyarrow.parquet.ParquetFile(path).read().to_pylist())
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not Parquet: {error}") from None
    return rows


def _read_dataset(path: Path) -> list[Row]:
    import datasets

    try:
        return datasets.load_from_disk(str(path)).to_list()
    except (ValueError, KeyError, IndexError, FileNotFoundError) as error:
        raise DataError(f"{path}: `datasets` cannot load it: {error}") from None


def _read_jsonl(path: Path) -> list[tuple[str, Row]]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return [
        (f"{path}:{number}", _parse_line(f"{path}:{number}", line))
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    ]


def _parse_line(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 at byte {error.start + 1} of the line: save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: wanted a JSON object, got {type(row).__name__}: {row!r:.60}")
    return row


def _check_fields(
    place: str, row: dict, required: Sequence[str], first: dict, first_number: str
) -> None:
    for name in required:
        if name not in row:
            near = difflib.get_close_matches(name, row, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(row) or 'none'}"
            raise DataError(f"{place}: the field {name!r} is missing: {hint}")
    for name in first:
        if name not in row:
            raise DataError(f"{place}: the field {name!r} is missing, {first_number} has it")
    for name in row:
        if name not in first:
            raise DataError(f"{place}: the field {name!r} is new, {first_number} lacks it")
    if isinstance(row["prompt"], list) != isinstance(first["prompt"], list):
        raise DataError(
            f"{place}: text and chat prompts are mixed: {first_number} is of the other kind"
        )
    _check_prompt(f"{place}: prompt", row["prompt"])


def _check_prompt(place: str, prompt: Any) -> None:
    if not isinstance(prompt, list):
        check_text(place, prompt, "text or a list of chat messages")
        return
    if not prompt:
        raise DataError(f"{place} is empty, wanted at least one chat message")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                f'{place}: message {i} must be {{"role": ..., "content": ...}}, got {message!r:.60}'
            )
        check_text(f"{place}: role of message {i}", message["role"])
        check_text(f"{place}: content of message {i}", message["content"])
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{place} ends with an assistant message: nothing is left to answer")


def check_text(place: str, value: Any, wanted: str = "text") -> None:
    """
    Raises:
        DataError: the value is no text, empty, or no valid Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{place} must be {wanted}, got {type(value).__name__}: {value!r:.60}")
    if not value:
        raise DataError(f"{place} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half a surrogate pair at character {error.start + 1}: "
            "it is not valid Unicode"
        ) from None
