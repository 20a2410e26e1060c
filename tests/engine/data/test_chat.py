"""Chat templates: the end of a turn, one BOS, and what they may not do."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.engine.data.test_rows import write_dataset, write_parquet
from tests.engine.random_models import new_learner
from tests.engine.tokenizers_of_others import (
    CHATML,
    GEMMA,
    LLAMA_2,
    LLAMA_3,
    byte_level,
    sentencepiece,
)
from warpo.engine.data import chat
from warpo.engine.data.chat import end_of_turn
from warpo.engine.data.examples import load_examples
from warpo.engine.data.prompts import load_prompts
from warpo.engine.errors import DataError
from warpo.engine.models.model import eos_token_ids

QUESTION = [{"role": "user", "content": "2+3="}]
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
GEMMA_TOKENIZER = dict(bos_token="<bos>", eos_token="<eos>", template=GEMMA)


def gemma():
    return byte_level("<start_of_turn>", "<end_of_turn>", **GEMMA_TOKENIZER)


def qwen():
    """A base model: its end of sequence is no end of a turn."""
    return byte_level("<|im_start|>", "<|im_end|>", template=CHATML, eos_token="<|endoftext|>")


def cohere():
    """Two tokens end a turn, the last of them ends sampling."""
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|END_RESPONSE|><|END_OF_TURN|>"
    return byte_level(
        "<|END_RESPONSE|>", template=turns + "{% endfor %}", eos_token="<|END_OF_TURN|>"
    )


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completions(tmp_path: Path, tokenizer, algorithm: str, row: dict) -> list[str]:
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    (example,) = load_examples(path, tokenizer, algorithm, token_budget=999, max_length=999)
    return [tokenizer.decode(ids) for ids in example.completions]


@pytest.mark.parametrize(
    ("tokenizer", "end", "eos"),
    [
        (gemma(), "<end_of_turn>", "<eos>"),
        (qwen(), "<|im_end|>", "<|endoftext|>"),
        (sentencepiece(LLAMA_2), "</s>", "</s>"),
        (cohere(), "<|END_RESPONSE|><|END_OF_TURN|>", "<|END_OF_TURN|>"),
        (byte_level(eos_token="</s>", template=PLAIN), "</s>", "</s>"),
    ],
    ids=["gemma", "qwen base", "llama 2", "cohere 2", "no token of a turn"],
)
def test_a_completion_ends_with_the_token_that_ends_a_turn(tmp_path, tokenizer, end, eos):
    pair = {"prompt": QUESTION, "chosen": "5", "rejected": "6"}
    for algorithm in ("dpo", "bradley_terry"):
        assert completions(tmp_path, tokenizer, algorithm, pair) == [f"5{end}", f"6{end}"]
    row = {"prompt": QUESTION, "completion": "5"}
    assert completions(tmp_path, tokenizer, "sft", row) == [f"5{end}"]
    # one that ends itself ends once
    assert completions(tmp_path, tokenizer, "sft", row | {"completion": f"5{end}"}) == [f"5{end}"]
    # text is no turn
    text = {"prompt": "2+3=", "completion": "5"}
    assert completions(tmp_path, tokenizer, "sft", text) == [f"5{eos}"]
    # sampling ends with both
    assert eos_token_ids(of_eos(None), tokenizer) == sorted(
        {tokenizer.convert_tokens_to_ids(end[end.rfind("<") :]), tokenizer.eos_token_id}
    )


def of_eos(token):
    """A model whose generation config has this end of a sequence."""
    model = new_learner("qwen2")
    model.resize_token_embeddings(1000)
    model.generation_config.eos_token_id = token
    return model


def test_no_template_and_one_that_refuses_a_turn(tmp_path):
    assert end_of_turn(byte_level(eos_token="</s>")) == []
    tokenizer = byte_level(eos_token="</s>", template="{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"d.jsonl: no end of a turn: the chat template .*: never"):
        completions(tmp_path, tokenizer, "sft", {"prompt": QUESTION, "completion": "5"})
    assert completions(tmp_path, tokenizer, "sft", {"prompt": "a", "completion": "5"}) == ["5</s>"]
    of_parts = byte_level(eos_token="</s>", template="{{ messages[0].content.text }}:</s>")
    with pytest.raises(DataError, match=r"d.jsonl: no end of a turn: .* leaves out what messages"):
        completions(tmp_path, of_parts, "sft", {"prompt": QUESTION, "completion": "5"})
    with pytest.raises(DataError, match=r"d.jsonl:1: .* leaves out what messages say as text"):
        load_prompts(tmp_path / "d.jsonl", of_parts, 99)
    assert eos_token_ids(of_eos(3), tokenizer) == [3, tokenizer.eos_token_id]


CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CHATS = [
    {"prompt": QUESTION, "completion": "5"},
    {
        "prompt": [
            {"role": "user", "content": "2+3=", "name": "ann"},
            {"role": "assistant", "content": "a call", "tool_calls": [CALL]},
            {"role": "tool", "content": "5"},
        ],
        "completion": "5",
    },
]


def test_rows_in_three_formats_give_the_same_tokens(tmp_path):
    """Parquet and `datasets` fill absent keys of messages with None."""
    tokenizer = byte_level(
        "<|start|>", "<|eot_id|>", template=LLAMA_3, bos_token="<|b|>", eos_token="<|e|>"
    )
    found, prompts, keys = [], [], []
    for write in (write_jsonl, write_parquet, write_dataset):
        path = write(tmp_path / write.__name__, CHATS)
        examples = load_examples(path, tokenizer, "sft", token_budget=999, max_length=999)
        found.append(list(examples))
        prompts.append(list(load_prompts(path, tokenizer, 999)))
        keys.append(examples.keys.tolist())
    assert keys[0] == keys[1] == keys[2]
    assert found[0] == found[1] == found[2]
    assert prompts[0] == prompts[1] == prompts[2]
    text = tokenizer.decode(prompts[0][1].token_ids)
    assert text == (
        "<|b|><|start|>user ann\n2+3=<|eot_id|><|start|>assistant\n"
        'add({"a": 2, "b": 3})<|eot_id|><|start|>tool\n5<|eot_id|><|start|>assistant\n'
    )


@pytest.mark.parametrize("text", ["<s>[INST] 2+3= [/INST]", "[INST] 2+3= [/INST]"])
def test_a_rendered_text_gets_one_bos(tmp_path, text):
    tokenizer = sentencepiece(LLAMA_2)
    (prompt,) = load_prompts(write_jsonl(tmp_path / "d", [{"prompt": text}]), tokenizer, 99)
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1 == prompt.token_ids[0]


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("2+3=", "5", ["5"]),
        ("2+3=", " 5", ["▁", "5"]),
        ("is it:", " yes", ["▁yes"]),
        # a token would span the border
        ("is it: ", "yes", ["yes"]),
        ("is it: y", "es", ["e", "s"]),
    ],
)
def test_a_completion_goes_on_as_sentencepiece_would(tmp_path, prompt, completion, tokens):
    tokenizer = sentencepiece()
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": prompt, "completion": completion}])
    (example,) = load_examples(path, tokenizer, "sft", token_budget=99, max_length=99)
    (ids,) = example.completions
    assert tokenizer.convert_ids_to_tokens(ids) == [*tokens, "</s>"]
    assert tokenizer.decode([*example.prompt_ids[1:], *ids[:-1]]) == prompt + completion
    (sampled,) = load_prompts(path, tokenizer, 99)
    assert example.prompt_ids == sampled.token_ids
    row = {"prompt": prompt, "steps": [completion], "labels": [1]}
    path = write_jsonl(tmp_path / "steps.jsonl", [row])
    (stepped,) = load_examples(
        path, tokenizer, "process_reward", token_budget=99, max_length=99, step_separator=";"
    )
    assert stepped.completions == [ids[:-1]] and stepped.ends == [len(ids) - 2]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content / 2 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "no element 7|has no attribute|index out of range"),
        ("{{ {}['a'].b }}", "has no attribute 'a'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10 ** 10 }}", "it takes more than 1024 MiB"),
        ("{{ 'x' * 2 ** 25 }}", "33554432 characters of them, more than 16777216"),
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "0.2 s"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_what_a_template_does_is_one_line_with_the_place(tmp_path, monkeypatch, template, message):
    if message == "0.2 s":
        monkeypatch.setattr(chat, "RENDER_S", 0.2)
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": QUESTION}])
    start = time.process_time()
    with pytest.raises(DataError, match=message) as refused:
        load_prompts(path, byte_level(eos_token="</s>", template=template), 99)
    assert time.process_time() - start < 5
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{path}:1: the chat template refuses the messages: ")
