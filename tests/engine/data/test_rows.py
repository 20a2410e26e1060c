"""The three forms of data, and held-out prompts."""

import gzip
import json
import os
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.engine.data.test_prompts import TEMPLATE, character_tokenizer
from warpo.engine.data.prompts import columns, load_prompts, split_prompts
from warpo.engine.data.rows import read_rows
from warpo.engine.errors import DataError

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "ab", "answer": "c"}]
CHAT = [
    {"prompt": [{"role": "user", "content": text}], "n": i} for i, text in enumerate(("a", "bc"))
]


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_dataset(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def write_folder(path, rows):
    path.mkdir()
    for number, row in enumerate(rows):
        write_parquet(path / f"train-{number:05d}-of-{len(rows):05d}.parquet", [row])
    return path


WRITERS = pytest.mark.parametrize("write", [write_parquet, write_dataset, write_folder])


@WRITERS
@pytest.mark.parametrize("rows", [ROWS, CHAT])
def test_prompts_and_fields_are_those_that_were_written(tmp_path, write, rows):
    tokenizer = character_tokenizer("<s> $A", TEMPLATE)
    prompts = load_prompts(write(tmp_path / "d", rows), tokenizer, 50)
    assert [row["prompt"] for row in rows] == columns(prompts)["prompt"]
    name = list(rows[0])[1]
    assert [row[name] for row in rows] == columns(prompts)[name]
    for row, prompt in zip(rows, prompts, strict=True):
        if rows is CHAT:
            wanted = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
            assert prompt.token_ids == wanted["input_ids"]
        else:
            assert tokenizer.decode(prompt.token_ids) == "<s>" + row["prompt"]


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (write_parquet, "d: row 1: prompt"),
        (write_dataset, "d: row 1: prompt"),
        (write_folder, "d/train-00001-of-00002.parquet: row 0: prompt"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_row(tmp_path, write, place):
    path = write(tmp_path / "d", [ROWS[0], {"prompt": None, "answer": "c"}])
    with pytest.raises(DataError, match=rf"{tmp_path}/{place} must be text .*, got NoneType"):
        load_prompts(path, character_tokenizer(), 5)


@WRITERS
def test_a_missing_field_is_refused(tmp_path, write):
    path = write(tmp_path / "d", [{"promt": "a"}])
    with pytest.raises(DataError, match=r"row 0: the field 'prompt' is missing: .*'promt'"):
        read_rows(path, required=("prompt",))


def test_rows_of_two_files_must_agree(tmp_path):
    path = tmp_path / "d"
    path.mkdir()
    write_parquet(path / "a.parquet", ROWS)
    write_parquet(path / "b.parquet", [{"prompt": "a"}])
    with pytest.raises(
        DataError, match=r"b.parquet: row 0: the field 'answer' .*a.parquet: row 0 has it"
    ):
        list(read_rows(path, required=("prompt",)).chunks())


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is a folder with neither a data set of `datasets`"):
        read_rows(tmp_path / "empty", required=())
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cut.parquet: not Parquet: "):
        read_rows(tmp_path / "cut.parquet", required=())
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in "ab"})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(
        DataError, match=r"splits holds several splits \(a, b\): name the folder of"
    ):
        read_rows(tmp_path / "splits", required=())
    assert len(read_rows(tmp_path / "splits/a", required=("prompt",))) == 2
    write_folder(tmp_path / "mixed", ROWS)
    write_parquet(tmp_path / "mixed/test-00000-of-00001.parquet", ROWS)
    with pytest.raises(
        DataError, match=r"mixed holds the Parquet files of several splits \(test, t"
    ):
        read_rows(tmp_path / "mixed", required=())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="bad: `datasets` cannot load it"):
        read_rows(tmp_path / "bad", required=())
    schema = pyarrow.schema([("prompt", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "no_rows")
    with pytest.raises(DataError, match="no_rows: the file is empty"):
        read_rows(tmp_path / "no_rows", required=())


COUNT = 3
NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(),
    COUNT,
    [None, pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xffb")],
)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (NOT_UTF8, r"row 1: the field 'answer' of type string cannot be read: 'utf-8' codec"),
        (
            pyarrow.array([1, 2**61, 3]).cast(pyarrow.timestamp("us")),
            r"row 1: the field 'answer' of type timestamp\[us\] cannot be read: ",
        ),
        (
            pyarrow.array([1, -(2**31), 3], pyarrow.int32()).cast(pyarrow.date32()),
            r"row 1: the field 'answer' of type date32\[day\] cannot be read: ",
        ),
    ],
)
def test_what_python_has_no_object_for_is_refused_by_row_and_field(tmp_path, column, message):
    table = pyarrow.table({"prompt": ["a", "b", "c"], "answer": column})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=rf"d.parquet: {message}"):
        load_prompts(tmp_path / "d.parquet", character_tokenizer(), 5)


def test_nested_columns_are_read_and_two_of_one_name_are_not(tmp_path):
    rows = [{"prompt": "a", "tests": [{"in": [1], "out": {"x": None}}], "answer": None}] * 2
    prompts = load_prompts(write_parquet(tmp_path / "d", rows), character_tokenizer(), 5)
    assert [prompt.fields for prompt in prompts] == rows
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "twice")
    with pytest.raises(DataError, match="twice: two columns are called 'prompt'"):
        read_rows(tmp_path / "twice", required=())


def test_jsonl_may_be_gzipped(tmp_path):
    content = b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}'
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    prompts = load_prompts(path, character_tokenizer(), 5)
    assert columns(prompts) == {"prompt": ["a", "b"]}
    path.write_bytes(gzip.compress(content + b"\n{"))
    with pytest.raises(DataError, match=r"d.jsonl.gz:4: not JSON"):
        load_prompts(path, character_tokenizer(), 5)
    path.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match=r"d.jsonl.gz: cannot be unzipped: "):
        load_prompts(path, character_tokenizer(), 5)


@pytest.mark.parametrize(
    "content", [b"prompt,answer\n1,2\n", b"PK\x03\x04\xff", b'[\n{"prompt": "a"}]', b"ARROW1\0"]
)
def test_another_format_is_told_which_there_are(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    formats = r"data is JSONL \(one JSON object per line, gzipped or not\) or Parquet"
    with pytest.raises(DataError, match=rf"d:1: not (JSON|UTF-8).*; {formats}"):
        read_rows(tmp_path / "d", required=())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=f"pipe is neither a file nor a folder: {formats}"):
        read_rows(tmp_path / "pipe", required=())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"\*.parquet files: name a file in it, such as a.jsonl"):
        read_rows(tmp_path / "folder", required=())


@pytest.mark.parametrize("parquet", [False, True])
def test_a_row_takes_few_bytes(tmp_path, parquet):
    """As Python objects, a row of 40 bytes and its 7 tokens took 3000."""
    rows = [{"prompt": f"{i}+{i}=", "answer": str(i)} for i in range(1000, 3000)]
    path = tmp_path / "d"
    if parquet:
        write_parquet(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = character_tokenizer()
    load_prompts(path, tokenizer, 99)
    tracemalloc.start()
    try:
        prompts = load_prompts(path, tokenizer, 99)
        held = tracemalloc.get_traced_memory()[0] / len(prompts)
    finally:
        tracemalloc.stop()
    assert held < 150, held
    assert prompts[1999].fields == rows[1999]


def test_held_out_prompts_are_not_learned_from_and_none_twice(tmp_path):
    texts = ["a", "b", "c", "a", "d", "b", "e", "a"]
    rows = [{"prompt": text, "n": i} for i, text in enumerate(texts)]
    prompts = load_prompts(write_parquet(tmp_path / "d", rows), character_tokenizer(), 5)
    seen = set()
    for seed in range(20):
        rest, held_out = split_prompts(prompts, 2, seed)
        out = {prompt.fields["prompt"] for prompt in held_out}
        assert len(held_out) == len(out) == 2
        assert [prompt.fields["n"] for prompt in rest] == [
            i for i, text in enumerate(texts) if text not in out
        ]
        assert all(
            prompt.fields["n"] == texts.index(prompt.fields["prompt"]) for prompt in held_out
        )
        again, same = split_prompts(prompts, 2, seed)
        assert list(again) == list(rest) and same == held_out
        seen |= out
    assert seen == set("abcde")
    with pytest.raises(DataError, match=r"data.eval = 5 would leave nothing.* 5 different prompts"):
        split_prompts(prompts, 5, 0)
