"""Files of examples: what the model reads of each form, and what is refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers

from examples import arithmetic
from warpo.engine.data.examples import Example, load_examples
from warpo.engine.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.make_tokenizer()


def load(tmp_path: Path, tokenizer, algorithm: str, *rows: dict, **options) -> list[Example]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"token_budget": 100, "max_length": 64} | options
    return list(load_examples(path, tokenizer, algorithm, **options))


def texts(tokenizer, example: Example) -> list[str]:
    return [tokenizer.decode(ids) for ids in example.completions]


def test_each_form_becomes_completions_and_numbers(tmp_path, tokenizer):
    pair = {"prompt": "1+2=", "chosen": "3", "rejected": "44", "margin": 2}
    (example,) = load(tmp_path, tokenizer, "dpo", pair)
    assert tokenizer.decode(example.prompt_ids) == "<bos>1+2="
    assert texts(tokenizer, example) == ["3<eos>", "44<eos>"]
    assert example.values == [] and example.num_tokens == 5 + 2 + 5 + 3
    (example,) = load(tmp_path, tokenizer, "bradley_terry", pair)
    assert example.values == [2.0]
    (example,) = load(tmp_path, tokenizer, "sft", {"prompt": "1+2=", "completion": "3"})
    assert texts(tokenizer, example) == ["3<eos>"]
    ranking = {"prompt": "1+2=", "completions": ["3", "30", "1"]}
    (example,) = load(tmp_path, tokenizer, "k_wise", ranking)
    assert texts(tokenizer, example) == ["3<eos>", "30<eos>", "1<eos>"]


def test_chat_prompts_go_through_the_template(tmp_path, tokenizer):
    chat = {"prompt": [{"role": "user", "content": "1+2="}], "completion": "3"}
    plain = {"prompt": "1+2=", "completion": "3"}
    (of_chat,), (of_text,) = (load(tmp_path, tokenizer, "sft", row) for row in (chat, plain))
    assert of_chat == of_text


def test_kto_pairs_each_prompt_with_the_next_completion_of_another(tmp_path, tokenizer):
    rows = [
        {"prompt": prompt, "completion": completion, "label": label}
        for prompt, completion, label in [("1=", "1", True), ("1=", "2", False), ("3=", "3", True)]
    ]
    found = load(tmp_path, tokenizer, "kto", *rows)
    assert [texts(tokenizer, example) for example in found] == [
        ["1<eos>", "3<eos>"],
        ["2<eos>", "3<eos>"],
        ["3<eos>", "1<eos>"],
    ]
    assert [example.values for example in found] == [[1.0], [0.0], [1.0]]


def test_steps_end_where_their_last_character_does(tmp_path, tokenizer):
    row = {"prompt": "1=", "steps": ["12=", "3="], "labels": [1, 0.5]}
    (example,) = load(tmp_path, tokenizer, "process_reward", row, step_separator="=")
    assert texts(tokenizer, example) == ["12=3="]
    assert example.ends == [2, 4] and example.values == [1.0, 0.5]
    row = {"prompt": "1=", "steps": ["1", "2"], "labels": [1, 0]}
    (example,) = load(tmp_path, tokenizer, "process_reward", row, step_separator="")
    assert example.ends == [0, 1]


PAIR = {"prompt": "1=", "chosen": "1", "rejected": "2"}
STEPS = {"prompt": "1=", "steps": ["1=", "2"], "labels": [1, 0]}


@pytest.mark.parametrize(
    ("algorithm", "row", "message"),
    [
        ("dpo", {"prompt": "1=", "chosen": "1", "reject": "2"}, "did you mean 'reject'"),
        ("dpo", PAIR | {"rejected": ""}, "rejected is empty"),
        ("dpo", PAIR | {"chosen": 5}, "chosen must be text, got int"),
        ("dpo", PAIR | {"chosen": "1" * 70}, "positions for 64"),
        ("dpo", PAIR | {"chosen": "1" * 50, "rejected": "1" * 50}, "update.token_budget = 100"),
        ("bradley_terry", PAIR | {"margin": -1}, "margin must be a number >= 0, got -1"),
        ("bradley_terry", PAIR | {"margin": float("nan")}, "NaN is not a finite number"),
        ("kto", {"prompt": "1=", "completion": "1", "label": 1}, "label must be true or false"),
        ("kto", {"prompt": "1=", "completion": "1", "label": True}, "two prompts that differ"),
        ("k_wise", {"prompt": "1=", "completions": ["1"]}, "2 texts or more"),
        ("k_wise", {"prompt": "1=", "completions": "12"}, "must be a list"),
        ("process_reward", STEPS | {"steps": []}, "1 texts or more"),
        ("process_reward", STEPS | {"labels": [1]}, "a list of 2 numbers"),
        ("process_reward", STEPS | {"labels": [1, 2]}, r"labels\[1\] must be a number from 0 to 1"),
        ("process_reward", STEPS | {"steps": ["1", "2"]}, r"steps\[0\] must end with"),
        ("process_reward", STEPS | {"steps": ["=1=", "2"]}, "hold it nowhere else"),
    ],
)
def test_a_bad_line_is_refused_by_its_place(tmp_path, tokenizer, algorithm, row, message):
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, tokenizer, algorithm, row, row, step_separator="=")
    assert str(error.value).startswith(str(tmp_path / "data.jsonl"))


def test_a_step_that_is_more_than_a_token_is_no_token(tmp_path, tokenizer):
    with pytest.raises(DataError, match="3 tokens are in 2 steps: wanted one token per step"):
        load(tmp_path, tokenizer, "process_reward", STEPS, step_separator="")


def test_two_steps_in_one_token_are_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "<eos>": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    with pytest.raises(DataError, match="two of its steps end in one token"):
        load(tmp_path, tokenizer, "process_reward", STEPS, step_separator="=")
