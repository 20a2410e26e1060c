"""The order of rows hangs on what they say; a resumed run may lose some and gain others."""

from __future__ import annotations

import io
import json

import pytest
import torch

from tests.engine.data.test_prompts import character_tokenizer
from warpo.engine.data.prompts import load_prompts, split_prompts
from warpo.engine.data.stream import PromptStream, RowRecord

ROWS = [{"prompt": f"{i % 10}+{i // 10}", "n": i} for i in range(40)]


@pytest.fixture
def load(tmp_path):
    def load_rows(rows):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(path, character_tokenizer(), 9)

    return load_rows


def stream_of(prompts, seed=3):
    return PromptStream(prompts, prompts.keys, 4, seed)


def draw(stream, steps):
    return [prompt.fields["n"] for _ in range(steps) for prompt in stream.next()]


def saved(stream):
    """The state as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_rows_elsewhere_in_the_file_are_drawn_alike(load):
    assert draw(stream_of(load(ROWS)), 30) == draw(stream_of(load(ROWS[::-1])), 30)


def test_each_of_equal_rows_is_drawn_once_an_epoch(load):
    stream = stream_of(load([{"prompt": "a", "n": 1}] * 3 + [{"prompt": "b", "n": 2}]))
    assert [sorted(draw(stream, 1)) for _ in range(3)] == [[1, 1, 1, 2]] * 3


@pytest.mark.parametrize("steps", [0, 1, 3, 10, 13, 20])
def test_a_resumed_run_without_some_rows_draws_the_rest_as_it_would_have(load, steps):
    whole = stream_of(load(ROWS))
    draw(whole, steps)
    state, expected = saved(whole), draw(whole, 30)
    gone = {5, 17, 23}
    rest = stream_of(load([row for row in ROWS if row["n"] not in gone]))
    rest.load_state_dict(state)
    found = draw(rest, 27)
    assert found == [n for n in expected if n not in gone][: len(found)]
    assert rest.changes == (
        "data.train is not what the checkpoint was trained on: 3 rows are gone, 0 are new, 0 have "
        "their prompt and other fields, 37 are as they were"
    )


def test_new_rows_join_and_changed_ones_keep_their_place(load):
    whole = stream_of(load(ROWS))
    draw(whole, 5)
    state, expected = saved(whole), draw(whole, 5)
    others = [row | {"n": 100 + row["n"]} if row["n"] < 10 else row for row in ROWS]
    changed = stream_of(load(others))
    changed.load_state_dict(state)
    assert [n % 100 for n in draw(changed, 5)] == expected
    assert "0 rows are gone, 0 are new, 10 have their prompt" in changed.changes
    grown = stream_of(load([*ROWS, {"prompt": "new", "n": 40}, ROWS[0]]))
    grown.load_state_dict(state)
    assert "0 rows are gone, 2 are new, 0 have" in grown.changes
    remaining = draw(grown, 20)
    old = [n for n in remaining if n < 40]
    assert [n for n in old if n != 0][:19] == [n for n in expected if n != 0][:19]
    same = stream_of(load(ROWS))
    same.load_state_dict(state)
    assert same.changes == ""


def test_a_record_alone_tells_the_same(load):
    record = RowRecord("pretraining.data", load(ROWS[1:]).keys)
    record.load_state_dict(RowRecord("pretraining.data", load(ROWS).keys).state_dict())
    assert record.changes.startswith(
        "pretraining.data is not what the checkpoint was trained on: 1"
    )


def test_a_row_less_leaves_the_others_held_out(load):
    _, held_out = split_prompts(load(ROWS), 8, 5)
    out = {prompt.fields["n"] for prompt in held_out}
    kept = [row for row in ROWS if row["n"] != next(iter(set(range(40)) - out))]
    _, again = split_prompts(load(kept), 8, 5)
    assert {prompt.fields["n"] for prompt in again} == out
    _, fewer = split_prompts(load([row for row in ROWS if row["n"] != min(out)]), 8, 5)
    assert len({prompt.fields["n"] for prompt in fewer} & out) == 7
