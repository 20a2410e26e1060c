"""Every algorithm that learns from given data, from its example. Slow: some ten seconds each.

Policies start at a held-out accuracy of about 0.25, greedy: the careless pupil's. What is stated
here is a step below what was measured with seed 0.
"""

import json

import pytest
import torch
import transformers

from examples import arithmetic
from tests.examples.runs import train_here
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.models.files import load_tokenizer

POLICIES = [name for name, row in ALGORITHMS.items() if row.family == "preference"]
# Held-out accuracy of pairs, of pairs of rankings, of steps.
REWARD_MODELS = {"bradley_terry": 0.85, "k_wise": 0.75, "process_reward": 0.85}


@pytest.fixture(scope="module")
def folder(prepared):
    return prepared("offline")


def greedy_accuracy(folder, name: str, steps: int) -> float:
    """Share of the held-out sums that a checkpoint gets right, by plain transformers."""
    saved = folder / f"runs/arithmetic/{name}/checkpoints/step-{steps:06d}"
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = load_tokenizer(str(saved))
    lines = (folder / "runs/arithmetic/eval.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    ids = tokenizer([row["prompt"] for row in rows], return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return sum(arithmetic.reward(texts, [row["answer"] for row in rows])) / len(rows)


@pytest.mark.slow(minutes=0.2)
@pytest.mark.parametrize("name", POLICIES)
def test_the_example_raises_held_out_accuracy(folder, name):
    assert greedy_accuracy(folder, "sft", 300) < 0.4
    rows = train_here(folder, name)
    assert greedy_accuracy(folder, name, 60) >= 0.85
    assert rows[-1]["eval/margin"] > rows[0]["eval/margin"]


@pytest.mark.slow(minutes=0.2)
@pytest.mark.parametrize("name", REWARD_MODELS)
def test_the_example_tells_right_from_wrong(folder, name):
    rows = train_here(folder, name)
    assert rows[-1]["eval/accuracy"] >= REWARD_MODELS[name]
    assert rows[-1]["eval/loss"] < 0.7 * rows[0]["eval/loss"]
