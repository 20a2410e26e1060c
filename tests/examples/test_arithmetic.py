"""The arithmetic task: the same seed gives the same files, and nothing held out leaks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import transformers

from examples import arithmetic
from tests.examples.configs import EXAMPLES
from warpo.engine.data.examples import load_examples
from warpo.engine.data.prompts import load_prompts
from warpo.engine.models.files import load_tokenizer
from warpo.engine.rollout.rewards.calls import Call, run
from warpo.engine.rollout.rewards.function import RewardFunction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arithmetic")
    arithmetic.main([str(path), "--seed", "0"])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return load_tokenizer(str(folder / "model"))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(row: dict[str, str]) -> tuple[int, int]:
    x, y = row["prompt"].removesuffix("=").split("+")
    return int(x), int(y)


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    arithmetic.write(tmp_path, 0)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_another_seed_changes_weights_problems_and_demonstrations(
    folder: Path, tmp_path: Path
) -> None:
    arithmetic.write(tmp_path, 1)
    for name in ("model/model.safetensors", "eval.jsonl", "train.jsonl", "warm_start.jsonl"):
        assert (folder / name).read_bytes() != (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("name", ["train", "warm_start"])
def test_held_out_problems_occur_nowhere_else(folder: Path, name: str) -> None:
    learned = {tuple(sorted(numbers(row))) for row in rows(folder / f"{name}.jsonl")}
    held_out = {tuple(sorted(numbers(row))) for row in rows(folder / "eval.jsonl")}
    assert len(held_out) == arithmetic.NUM_HELD_OUT
    assert not learned & held_out


def test_every_problem_is_learned_from_or_held_out(folder: Path) -> None:
    train = [numbers(row) for row in rows(folder / "train.jsonl")]
    assert len(set(train)) == len(train)
    held_out = {numbers(row) for row in rows(folder / "eval.jsonl")}
    exchanged = {(y, x) for x, y in held_out}
    everything = {(x, y) for x in range(10, 100) for y in range(10, 100)}
    assert set(train) | held_out | exchanged == everything


@pytest.mark.parametrize("name", ["train", "eval"])
def test_answers_are_the_sums(folder: Path, name: str) -> None:
    assert all(int(row["answer"]) == sum(numbers(row)) for row in rows(folder / f"{name}.jsonl"))


def test_a_pupil_who_forgets_nothing_is_always_right() -> None:
    pairs = [(x, y) for x in range(10, 100) for y in range(10, 100)]
    written = [arithmetic.column_addition(x, y, 0.0, random.Random(0)) for x, y in pairs]
    assert arithmetic.reward(written, [str(x + y) for x, y in pairs]) == [1.0] * len(pairs)


def test_forgetting_changes_carries_and_nothing_else() -> None:
    always = random.Random(0)
    assert arithmetic.column_addition(57, 68, 0.0, always) == "5121"
    assert arithmetic.column_addition(57, 68, 1.0, always) == "5010"
    assert arithmetic.column_addition(12, 34, 1.0, always) == "6040"


def test_demonstrations_are_well_formed_and_wrong_as_often_as_the_pupil_forgets(
    folder: Path,
) -> None:
    demonstrations = rows(folder / "warm_start.jsonl")
    assert all(arithmetic.read_sum(row["completion"]) is not None for row in demonstrations)
    carrying = [row for row in demonstrations if numbers(row)[0] % 10 + numbers(row)[1] % 10 >= 10]
    forgotten = sum(row["completion"][1] == "0" for row in carrying) / len(carrying)
    # 4.5 standard deviations of a share of at least 8,000 draws
    assert len(carrying) > 8000
    assert forgotten == pytest.approx(arithmetic.CARRY_FORGOTTEN, abs=0.025)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("5121", "125", 1.0),
        ("5021", "125", 1.0),  # the carry between the columns is not checked
        ("5120", "125", 0.0),
        ("5111", "125", 0.0),
        ("5090", "95", 1.0),
        ("5091", "95", 0.0),
        ("", "95", 0.0),
        ("509", "95", 0.0),
        ("50900", "95", 0.0),
        ("5090\n", "95", 0.0),
        (" 5090", "95", 0.0),
        ("5290", "95", 0.0),
        ("95", "95", 0.0),
        ("5+9=", "95", 0.0),
        ("٥٠٩٠", "95", 0.0),
    ],
)
def test_reward(completion: str, answer: str, expected: float) -> None:
    assert arithmetic.reward([completion], [answer]) == [expected]


def test_reward_of_a_batch_is_in_order_and_ignores_further_fields() -> None:
    rewards = arithmetic.reward(
        completions=["5121", "0000"], answer=["125", "11"], prompt=["57+68=", "0+11="]
    )
    assert rewards == [1.0, 0.0]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        arithmetic.reward(["5121", "0000"], ["125"])


def test_reward_serves_in_the_worker_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    columns = {"prompt": ["57+68=", "57+68="], "answer": ["125", "125"]}
    function = RewardFunction("examples.arithmetic:reward", deadline_s=30, fields=list(columns))
    with closing(function):
        call = Call(["5121", "5010"], columns)
        assert run(function.lanes[0](call)) == [1.0, 0.0]


def test_import_leaves_torch_and_transformers_alone() -> None:
    code = (
        "import sys, examples.arithmetic\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_tokenizer_round_trip(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    ids = tokenizer("57+68=")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 7
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "57+68="
    answer = tokenizer("5121", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*answer, tokenizer.eos_token_id], skip_special_tokens=True) == "5121"


@pytest.mark.parametrize("text", ["5 7", "5\n7", "5é7"])
def test_a_foreign_character_is_one_unknown_token(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 4
    assert ids[2] == tokenizer.unk_token_id


def test_transformers_alone_reads_the_texts_of_the_task_the_same(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    # AutoTokenizer makes a Qwen2Tokenizer of it, whose rules for splitting text are others.
    other = transformers.AutoTokenizer.from_pretrained(folder / "model")
    examples = rows(folder / "warm_start.jsonl")
    texts = [row["prompt"] + row["completion"] for row in examples]
    assert other(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_chat_template(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "57+68="}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer("57+68=")["input_ids"]
    messages.append({"role": "assistant", "content": "5121"})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<bos>57+68=5121<eos>"


def test_the_engine_reads_the_files(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    prompts = load_prompts(folder / "train.jsonl", tokenizer, max_prompt_tokens=7)
    assert {len(prompt.token_ids) for prompt in prompts} == {7}
    examples = load_examples(
        folder / "warm_start.jsonl", tokenizer, "sft", token_budget=12, max_length=12
    )
    assert {len(example.token_ids) for example in examples} == {12}
    assert {len(example.prompt_ids) for example in examples} == {7}


def test_model_size_and_special_tokens(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 5_000_000
    assert model.config.vocab_size == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
