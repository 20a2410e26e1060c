"""Data files, damaged: each is loaded, or refused in one line that names it."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import random
import shutil
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerFast

from tests.engine.tokenizers_of_others import LLAMA_3, byte_level
from warpo.engine.data.examples import load_examples
from warpo.engine.data.prompts import load_prompts, split_prompts
from warpo.engine.data.stream import PromptStream
from warpo.engine.errors import WarpoError
from warpo.engine.rollout.rewards.fields import check_fields

Row = dict[str, Any]
datasets.disable_progress_bars()

# What a value of a row is replaced by; of Parquet too.
NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 2**63 - 1, 0.5, float("nan"), float("inf"), "", " ", "\x00", "\u2028",
    "a\r\nb", "</s>", "<|b|>", "<|eot_id|>", "\ufeff", "\U0001f600" * 50, "x" * 5000, [], {}, [[]],
    [None], [{}],
    {"role": "user"}, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}],
    [{"role": None, "content": "a"}], [{"role": "user", "content": None}], ["a"], ["a", "b"],
    [{"role": "user", "content": "a", "tool_calls": []}],
    [{"role": "user", "content": "a", "tool_calls": [{"function": 3}]}], b"\xff", b"text",
    datetime.date(1, 1, 1), datetime.datetime(2020, 1, 1), decimal.Decimal("1.5"),
)  # fmt: skip
# What stands in for a piece of a line of JSON.
PIECES = (
    b"1" * 5000, b"-" + b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity",
    b"[" * 3000, b"[" * 150 + b"]" * 150, b'{"a":' * 3000, b'{"a":' * 150 + b"1" + b"}" * 150,
    b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b'{"a": 1, "a": 2}', b"\xff\xfe",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x00", b"\r", b"\n", b"\r\n", b"\\", b'"', b"{", b"}", b"[",
    b"]", b",", b":", b"null", b"true", b"'", b"//", b"\x1f\x8b", b"PAR1", b"\xe2\x80\xa8",
    b"\\u0000", b"1.", b"01", b"+1", b"",
)  # fmt: skip
FORMS: dict[str, Callable[[random.Random, int], Row]] = {
    "prompts": lambda rng, i: {"prompt": f"{i}+{i}=", "answer": str(2 * i)},
    "chats": lambda rng, i: {
        "prompt": [{"role": "user", "content": f"{i}?"}],
        "answer": rng.choice([i, str(i), 0.5]),
    },
    "sft": lambda rng, i: {"prompt": f"{i}+{i}=", "completion": str(2 * i)},
    "dpo": lambda rng, i: {"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "no"},
    "bradley_terry": lambda rng, i: {
        "prompt": f"{i}=",
        "chosen": "a",
        "rejected": "b",
        "margin": 0.5,
    },
    "kto": lambda rng, i: {"prompt": f"{i}", "completion": "a", "label": rng.random() < 0.5},
    "k_wise": lambda rng, i: {"prompt": f"{i}", "completions": ["a", "b"]},
    "process_reward": lambda rng, i: {
        "prompt": f"{i}",
        "steps": ["a\n", "b"],
        "labels": [1.0, 0.0],
    },
}


def attack(seed: int, folder: Path) -> str | None:
    """Damage a data file by the seed and load it. None, or what went wrong in a line."""
    rng = random.Random(seed)
    form, count = rng.choice(list(FORMS)), rng.choice([1, 2, 5, 5, 5])
    rows = [FORMS[form](rng, i) for i in range(count)]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        _replace_value(rng, rows)
    kind = rng.choice(["jsonl"] * 9 + ["gzip"] * 3 + ["parquet"] * 3 + ["dataset"])
    path = folder / f"{seed}.{kind}"
    try:
        if kind == "dataset":
            return _attack_dataset(rng, form, rows, path)
        path.write_bytes(_parquet(rng, rows, path) if kind == "parquet" else _lines(rng, rows))
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return None  # Arrow has no such table
    content = path.read_bytes()
    if kind == "gzip":
        path.write_bytes(
            _damage(rng, gzip.compress(content)) if rng.random() < 0.5 else gzip.compress(content)
        )
    elif kind == "parquet" and rng.random() < 0.7:
        path.write_bytes(_damage(rng, content))
    return _judge(form, path, content if kind == "jsonl" else None)


def _attack_dataset(rng: random.Random, form: str, rows: list[Row], path: Path) -> str | None:
    """The same with a folder of `datasets`."""
    datasets.Dataset.from_list(rows).save_to_disk(path)
    damaged = rng.choice(sorted(path.iterdir()))
    if rng.random() < 0.1:
        damaged.unlink()
    elif rng.random() < 0.8:
        damaged.write_bytes(_damage(rng, damaged.read_bytes()))
    return _judge(form, path, None)


def _judge(form: str, path: Path, content: bytes | None) -> str | None:
    """Load the file and return the fault found, if any; the file stays then."""
    try:
        problem = _load(form, path, content)
    except WarpoError as error:
        problem = None if _is_good(str(error), path) else f"bad message: {error!r:.300}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error!s:.200} in {last.filename}:{last.lineno}"
    if problem is not None:
        return f"{form}, {path}: {problem}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _is_good(message: str, path: Path) -> bool:
    return "\n" not in message and len(message) < 1000 and str(path) in message


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(
        "<|start|>", "<|eot_id|>", template=LLAMA_3, bos_token="<|b|>", eos_token="</s>"
    )


def _load(form: str, path: Path, content: bytes | None) -> str | None:
    """Load the file as a run would; what differs from what it says, in a line."""
    if form not in ("prompts", "chats"):
        examples = load_examples(path, _tokenizer(), form, token_budget=20000, max_length=20000)
        stream = PromptStream(examples, examples.keys, 2, 0)
        drawn = [stream.next() for _ in range(3)]
        empty = not all(ids for step in drawn for example in step for ids in example.completions)
        return "an empty completion" if empty else None
    check = check_fields(["math", "http://localhost"])
    prompts = load_prompts(path, _tokenizer(), 8000, check)
    if content is not None:
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        wanted = [json.loads(line) for line in lines if line.strip()]
        found = [prompt.fields for prompt in prompts]
        if form == "prompts" and repr(found) != repr(wanted):
            return f"rows are not those of the file: {found!r:.200}"
    if len(prompts) > 2 and len(set(prompts.token_digests().tolist())) > 1:
        rest, held_out = split_prompts(prompts, 1, 0)
        if not len(rest) or len(held_out) != 1:
            return "a wrong split"
    return None if all(prompt.token_ids for prompt in prompts) else "an empty prompt"


def _replace_value(rng: random.Random, rows: list[Row]) -> None:
    row = rng.choice(rows)
    name, action = rng.choice(list(row)), rng.random()
    if action < 0.8:
        row[name] = rng.choice(NASTY)
    elif action < 0.9:
        del row[name]
        row.setdefault(rng.choice(["promt", "question", "completions", "prompts", ""]), 1)
    else:
        row[rng.choice(["extra", "completions", "prompts", "\u00e9", "messages"])] = rng.choice(
            NASTY
        )


def _lines(rng: random.Random, rows: list[Row]) -> bytes:
    lines = [json.dumps(row, default=str, ensure_ascii=rng.random() < 0.5).encode() for row in rows]
    content = rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines)
    content = rng.choice([b"", b"", b"\xef\xbb\xbf", b"\n"]) + content + rng.choice([b"", b"\n"])
    return _damage(rng, content) if rng.random() < 0.7 else content


def _damage(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 5])):
        a = rng.randrange(len(content) + 1)
        b = min(len(content), a + rng.choice([0, 0, 1, 1, 4, 30, len(content)]))
        action = rng.random()
        if action < 0.5:
            content = content[:a] + rng.choice(PIECES) + content[b:]
        elif action < 0.7 and a < len(content):
            flipped = content[a] ^ (1 << rng.randrange(8))
            content = content[:a] + bytes([flipped]) + content[a + 1 :]
        elif action < 0.85:
            content = content[:a] + content[a:b] * 2 + content[b:]
        else:
            content = content[:a] + content[b:]
    return content


def _parquet(rng: random.Random, rows: list[Row], path: Path) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    if rng.random() < 0.4:
        place = rng.randrange(table.num_columns)
        name = rng.choice([table.column_names[place], "extra", table.column_names[0]])
        table = table.set_column(place, name, _column(rng, table.num_rows))
    pyarrow.parquet.write_table(
        table,
        path,
        compression=rng.choice(["none", "snappy", "zstd"]),
        write_page_checksum=rng.random() < 0.5,
    )
    return path.read_bytes()


def _column(rng: random.Random, count: int) -> pyarrow.Array:
    """A column that Python has no objects for, or other ones than one thinks."""
    text = pyarrow.array(["\u00e9a"] * count).buffers()
    broken = bytearray(text[2].to_pybytes())
    broken[0] = 0xFF
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), count, [None, text[1], pyarrow.py_buffer(bytes(broken))]
    )
    columns = [
        not_utf8,
        pyarrow.array([2**60] * count, pyarrow.int64()).cast(pyarrow.timestamp("s")),
        pyarrow.array([-(2**31)] * count, pyarrow.int32()).cast(pyarrow.date32()),
        pyarrow.array([2**62] * count, pyarrow.int64()).cast(pyarrow.duration("s")),
        pyarrow.array([[("a", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        pyarrow.array(["a"] * count).dictionary_encode(),
        pyarrow.array([b"\xff"] * count),
        pyarrow.array([decimal.Decimal("1.50")] * count),
        pyarrow.array([None] * count),
        pyarrow.array([[[[["a"]]]]] * count),
        pyarrow.array([{"role": "user", "content": None}] * count),
        pyarrow.array([1.5] * count, pyarrow.float16()),
        pyarrow.array(["a"] * count, pyarrow.large_string()),
    ]
    return rng.choice(columns)
