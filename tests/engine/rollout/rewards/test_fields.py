"""A row that a reward cannot use is refused when it is loaded."""

import datetime
import json

import pytest

from tests.engine.data.test_prompts import character_tokenizer
from tests.engine.data.test_rows import write_parquet
from warpo.engine.data.prompts import load_prompts
from warpo.engine.errors import DataError
from warpo.engine.rollout.rewards.fields import check_fields


@pytest.mark.parametrize("answer", [None, "", " ", True, [4], {"a": 1}])
def test_math_needs_an_answer_in_every_row(tmp_path, answer):
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "a", "answer": answer}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = check_fields(["0.5 * math", "overlong:2"])
    with pytest.raises(
        DataError, match=r"d.jsonl:2: reward math: the field 'answer' must be text or"
    ):
        load_prompts(path, character_tokenizer(), 5, check)
    # a function may read it as it likes
    assert len(load_prompts(path, character_tokenizer(), 5, check_fields(["module:function"]))) == 2


@pytest.mark.parametrize("value", [datetime.date(2020, 1, 1), b"a", float("nan"), [float("inf")]])
def test_a_server_needs_json(tmp_path, value):
    path = write_parquet(tmp_path / "d", [{"prompt": "a", "tests": value}])
    with pytest.raises(
        DataError, match=r"d: row 0: reward server: the field 'tests' is not JSON but"
    ):
        load_prompts(path, character_tokenizer(), 5, check_fields(["http://localhost"]))
    assert len(load_prompts(path, character_tokenizer(), 5, check_fields(["math"]))) == 1
