"""The rows of a data set on disk, checked: JSONL, Parquet, or a folder of Hugging Face datasets.

What a path is, is seen from what lies there:

    a file that begins with PAR1               Parquet
    any other file                             JSONL, one object per line; gzipped or not
    a folder with dataset_info.json            a data set that `datasets` saved (save_to_disk)
    any other folder                           its *.parquet files, in the order of their names

A row is called by the line of its file, or by its number from 0 in the other three. It is kept as
its file has it, and becomes Python objects only where it is read: a row of 40 bytes is 400 bytes of
those.
"""

from __future__ import annotations

import difflib
import gzip
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from warpo.engine.data.json_lines import FORMATS, JsonLines, Row
from warpo.engine.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")
R = TypeVar("R")
# Rows that are Python objects at once while a data set is loaded.
CHUNK = 2048
# datasets and the hub write the shards of a split so: train-00000-of-00002.parquet
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.parquet")


class _Part(Protocol):
    """The rows of one file."""

    path: Path

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Row]: ...

    def number(self, index: int) -> str: ...


class Rows:
    """The rows of a data set: all have the same fields, `required` among them, whose first is
    "prompt", or the name of one that is text.

    Attributes:
        fields: their names, in the order of the first row.

    Raises:
        DataError: there is no row, or the first one is not usable.
    """

    def __init__(self, path: Path, parts: Sequence[_Part], required: Sequence[str]) -> None:
        self._path, self._parts, self._required = path, parts, required
        self._lead = required[0] if required else "prompt"
        self._starts = [0, *accumulate(len(part) for part in parts)]
        if not len(self):
            raise DataError(f"{path}: the file is empty, wanted one JSON object per line, or rows")
        first = self._read(0, 1)[0]
        self.fields, self._names = list(first), first.keys()
        if missing := [name for name in required if name not in first]:
            raise DataError(f"{self.place(0)}: {_missing(missing[0], first, required)}")
        self._is_chat = isinstance(first.get("prompt"), list)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        return self._read(index, index + 1)[0]

    def place(self, index: int) -> str:
        """ "FILE:LINE" or "PATH: row NUMBER"."""
        part, start = self._part_of(index)
        number = part.number(index - start)
        return f"{part.path}:{number}" if number.isdecimal() else f"{part.path}: {number}"

    def chunks(self) -> Iterator[tuple[int, list[Row]]]:
        """(index of the first, rows) of each CHUNK rows in turn.

        Raises:
            DataError: a row is not usable; names place, field, reason.
        """
        for start in range(0, len(self), CHUNK):
            rows = self._read(start, min(start + CHUNK, len(self)))
            self.each(start, rows, self._check)
            yield start, rows

    def each(self, start: int, items: Iterable[T], function: Callable[[T], R]) -> list[R]:
        """function(item) of each, the first of which belongs to the row of index `start`.

        Raises:
            DataError: as the function does, with the place of the row.
        """
        results: list[R] = []
        try:
            for item in items:
                results.append(function(item))
        except DataError as error:
            raise DataError(f"{self.place(start + len(results))}: {error}") from None
        return results

    def all(
        self, start: int, items: Sequence[T], function: Callable[[Sequence[T]], list[R]]
    ) -> list[R]:
        """function(items), which returns a result for each of them.

        Raises:
            DataError: as the function does, with the place of the first row that fails by itself.
        """
        try:
            return function(items)
        except DataError:
            return self.each(start, items, lambda item: function([item])[0])

    def _part_of(self, index: int) -> tuple[_Part, int]:
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], self._starts[number]

    def _read(self, start: int, stop: int) -> list[Row]:
        rows: list[Row] = []
        while start + len(rows) < stop:
            index = start + len(rows)
            part, first = self._part_of(index)
            rows += part.read(index - first, min(stop - first, len(part)))
        for row in rows:
            if isinstance(messages := row.get("prompt"), list):
                row["prompt"] = [_without_none(message) for message in messages]
        return rows

    def _check(self, row: Row) -> None:
        if row.keys() != self._names:
            self._refuse_fields(row)
        lead = self._lead
        prompt = row[lead]
        if lead != "prompt":
            check_text(lead, prompt)
            return
        if isinstance(prompt, list) != self._is_chat:
            raise DataError(
                f"text and chat prompts are mixed: {self._first_place} is of the other kind"
            )
        if self._is_chat:
            _check_messages(prompt)
        else:
            check_text("prompt", prompt, "text or a list of chat messages")

    def _refuse_fields(self, row: Row) -> NoReturn:
        for name in self._required:
            if name not in row:
                raise DataError(_missing(name, row, self._required))
        for name in self._names:
            if name not in row:
                raise DataError(f"the field {name!r:.60} is missing, {self._first_place} has it")
        name = next(name for name in row if name not in self._names)
        raise DataError(f"the field {name!r:.60} is new, {self._first_place} lacks it")

    @property
    def _first_place(self) -> str:
        """The first row, by its number only where the data is one file: "line 3" or "row 2"."""
        if self._parts[0].path != self._path:
            return self.place(0)
        number = self._parts[0].number(0)
        return f"line {number}" if number.isdecimal() else number


def read_rows(path: Path, required: Sequence[str]) -> Rows:
    """The rows of a data set; `chunks` checks them.

    Raises:
        DataError: the data cannot be read; names the path and the reason.
    """
    try:
        return Rows(path, _open(path), required)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _open(path: Path) -> Sequence[_Part]:
    if not path.is_dir():
        return [_open_file(path)]
    if (path / "dataset_info.json").exists():
        return [_Table(path, _read_dataset(path))]
    if (path / "dataset_dict.json").exists():
        names = ", ".join(sorted(p.parent.name for p in path.glob("*/dataset_info.json")))
        raise DataError(f"{path} holds several splits ({names}): name the folder of one of them")
    files = sorted(path.glob("*.parquet"))
    if not files:
        others = [file.name for file in sorted(path.glob("*.json*"))]
        raise DataError(
            f"{path} is a folder with neither a data set of `datasets` (dataset_info.json) nor "
            "*.parquet files" + (f": name a file in it, such as {others[0]}" if others else "")
        )
    splits = sorted({match[1] for file in files if (match := _SHARD.fullmatch(file.name))})
    if len(splits) > 1:
        raise DataError(
            f"{path} holds the Parquet files of several splits ({', '.join(splits)}): put those of "
            "one into a folder of their own"
        )
    return [_Table(file, _read_parquet(file)) for file in files]


def _open_file(path: Path) -> _Part:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder: {FORMATS}")
    with path.open("rb") as file:
        begins = file.read(4)
    if begins == b"PAR1":
        return _Table(path, _read_parquet(path))
    if begins[:2] != b"\x1f\x8b":
        return JsonLines(path, path.read_bytes())
    try:
        return JsonLines(path, gzip.decompress(path.read_bytes()))
    except Exception as error:  # EOFError, zlib.error, OSError, MemoryError: the file is damaged
        raise DataError(f"{path}: cannot be unzipped: {one_line(error)}") from None


def _missing(name: str, row: Row, required: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, row, n=1)
    hint = f"did you mean {near[0]!r:.60}? " if near else ""
    return (
        f"the field {name!r} is missing: {hint}the row has {_list(row)}, wanted "
        f"{', '.join(required)}"
    )


def _list(names: Iterable[str]) -> str:
    """The names, the first of many, in a line whatever they are."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    parts = [f"{name:.40}" for name in shown[:12]] + (["..."] if len(shown) > 12 else [])
    return ", ".join(parts) or "none"


class _Table:
    """Rows of a table of Arrow, in memory or mapped from the files of `datasets`."""

    def __init__(self, path: Path, table: pyarrow.Table) -> None:
        self.path, self._table = path, table
        names = table.column_names
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{path}: two columns are called {name!r:.60}: rename one of them")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def number(self, index: int) -> str:
        return f"row {index}"

    def read(self, start: int, stop: int) -> list[Row]:
        try:
            rows: list[Row] = self._table.slice(start, stop - start).to_pylist()
        # Text that is not UTF-8, dates beyond the year 9999, types without a Python object: each
        # ends in an exception of another kind.
        except Exception:
            for index in range(start, stop):
                self._check(index)
            raise
        return rows

    def _check(self, index: int) -> None:
        for name in self._table.column_names:
            try:
                self._table.column(name).slice(index, 1).to_pylist()
            except Exception as error:
                raise DataError(
                    f"{self.path}: row {index}: the field {name!r:.60} of type "
                    f"{self._table.schema.field(name).type} cannot be read: {one_line(error)}"
                ) from None


def _read_parquet(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).read()
    except Exception as error:  # pyarrow raises whatever it stumbles over in a damaged file
        raise DataError(f"{path}: not Parquet: {one_line(error)}") from None


def _read_dataset(path: Path) -> pyarrow.Table:
    import datasets

    try:
        table = datasets.load_from_disk(str(path)).with_format("arrow")[:]
        # An Arrow file is mapped as it is: offsets of a damaged one point anywhere in memory.
        table.validate(full=True)
        return table
    except Exception as error:  # as with Parquet
        raise DataError(f"{path}: `datasets` cannot load it: {one_line(error)}") from None


def _without_none(value: Any) -> Any:
    """The value without keys that are None: Parquet and `datasets` fill in what a row lacks."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _check_messages(prompt: list[Any]) -> None:
    if not prompt:
        raise DataError("prompt is empty, wanted at least one chat message")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                f'prompt: message {i} must be {{"role": ..., "content": ...}}, got {message!r:.60}'
            )
        check_text(f"prompt: role of message {i}", message["role"])
        check_text(f"prompt: content of message {i}", message["content"])
    if prompt[-1]["role"] == "assistant":
        raise DataError("prompt ends with an assistant message: nothing is left to answer")


def check_text(name: str, value: Any, wanted: str = "text") -> None:
    """
    Raises:
        DataError: the value is not text, or empty.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} must be {wanted}, got {type(value).__name__}: {value!r:.60}")
    if not value:
        raise DataError(f"{name} is empty")
