"""Whole runs, on the real samplers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import transformers

from tests.engine.models import CONFIGS, MAX_MODEL_LEN, new_learner
from warpo.engine.config import load_config
from warpo.engine.errors import RewardError, WeightMismatch
from warpo.engine.train import run

CONFIG = """
model: {folder}/model
output_dir: {folder}/out
steps: 4
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl}}
reward: {{function: "token_rewards:low", deadline_s: 60}}
rollout:
  {{prompts_per_step: 3, group_size: 4, max_new_tokens: 6, max_model_len: 64, kv_cache_gib: 0.03}}
loss: {{objective: grpo, kl_coef: 0.01}}
update: {{lr: 1e-3, token_budget: 64, minibatches: 2, epochs: 2}}
probe: {{tolerance: 1e-3}}
evaluation: {{every_steps: 2}}
"""

REWARDS = """
import os

def low(completions, word):
    \"\"\"Share of tokens below t30.\"\"\"
    if os.path.exists("fail"):
        raise ValueError("the reward was told to fail")
    scores = [[int(t[1:]) < 30 for t in text.split()] for text in completions]
    return [sum(s) / max(1, len(s)) for s in scores]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model with its tokenizer, data and a reward function, as a user has them."""
    size = CONFIGS["qwen2"]().vocab_size
    vocabulary = {f"t{i}": i for i in range(2, size)} | {"<pad>": 0, "<eos>": 1}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="t3")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "model")
    new_learner("qwen2").save_pretrained(tmp_path / "model")
    for name, start in (("train", 0), ("eval", 10)):
        rows = [
            {"prompt": f"t{10 + i} t{40 - i} t7", "word": str(i)} for i in range(start, start + 9)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "token_rewards.py").write_text(REWARDS)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    assert MAX_MODEL_LEN >= 64
    return tmp_path


def train(folder: Path, *overrides: str) -> list[dict]:
    """Run in this process; the rows of metrics.jsonl without timings."""
    run(load_config(folder / "config.yaml", overrides))
    return rows(folder)


def rows(folder: Path, out: str = "out") -> list[dict]:
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines
    ]


def test_a_run_leaves_rows_curves_and_a_model_that_transformers_loads(folder, kind):
    table = train(folder, "--sampler", kind)
    assert [row["step"] for row in table] == [0, 1, 2, 3, 4]
    assert ["eval/accuracy" in row for row in table] == [True, False, True, False, True]
    last = table[-1]
    assert last["publish/version"] == 5 and last["publish/bytes"] > 0
    assert last["probe/max_difference"] < 1e-4
    assert last["kl/mean"] > 0, "the policy did not move from the reference"
    assert last["update/changed_frac"] > 0.5
    assert last["update/rounding_lost_frac"] == pytest.approx(0, abs=1e-5)
    assert (folder / "out/learning.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "out/tensorboard").iterdir())
    checkpoint = folder / "out/checkpoints/step-000004"
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    transformers.AutoTokenizer.from_pretrained(checkpoint)


def test_a_resumed_run_has_the_numbers_of_the_whole_one(folder, kind):
    run(load_config(folder / "config.yaml", ["--sampler", kind, "--output_dir", "whole"]))
    whole = rows(folder, "whole")
    train(folder, "--sampler", kind, "--steps", "2")
    train(folder, "--sampler", kind, "--steps", "4", "--resume", "true")
    parts = rows(folder)
    assert [row["step"] for row in parts] == [0, 1, 2, 3, 4]
    for a, b in zip(whole, parts, strict=True):
        # the version counts the publishes of a process
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if k != "publish/version"} == {
            k: v for k, v in b.items() if k != "publish/version"
        }


@pytest.mark.parametrize("step", [0, 2])
def test_a_publish_that_does_not_arrive_is_caught_in_its_step(folder, kind, monkeypatch, step):
    """The fault that other systems shipped: the sampler keeps sampling from old weights."""
    from warpo.engine.sampler.transformers import TransformersSampler
    from warpo.engine.sampler.vllm import VllmSampler

    sampler = {"vllm": VllmSampler, "transformers": TransformersSampler}[kind]
    publish = sampler.publish

    def broken(self, model):
        if self.weight_version < step:
            return publish(self, model)
        self.weight_version += 1
        return 0

    monkeypatch.setattr(sampler, "publish", broken)
    # the learner moves away from the checkpoint that the sampler has loaded
    warm = [{"prompt": "t9 t8", "completion": "t20 t21 t22"}]
    (folder / "warm.jsonl").write_text("\n".join(map(json.dumps, warm)))
    overrides = [
        "--warm_start.data",
        "warm.jsonl",
        "--warm_start.steps",
        "5",
        "--warm_start.lr",
        "1e-2",
    ]
    with pytest.raises(WeightMismatch, match="Either publishing failed"):
        train(folder, "--sampler", kind, *overrides)
    # publish number 0 is that before step 1; the learner's update of the step is kept
    saved = sorted(p.name for p in (folder / "out/checkpoints").iterdir())
    assert saved[-1] == f"step-{step:06d}"


def test_a_failing_reward_leaves_a_checkpoint_that_resumes(folder):
    train(folder, "--sampler", "transformers", "--steps", "2")
    (folder / "fail").touch()
    with pytest.raises(RewardError, match="the reward was told to fail"):
        train(folder, "--sampler", "transformers", "--resume", "true")
    (folder / "fail").unlink()
    table = train(folder, "--sampler", "transformers", "--resume", "true")
    assert [row["step"] for row in table] == [0, 1, 2, 3, 4]


def command(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "warpo.engine.cli", "train", "config.yaml", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_and_exits_130(folder, kind, number):
    if kind == "transformers" and number == signal.SIGTERM:
        pytest.skip("the signal handler is the same")
    process = command(folder, "--sampler", kind, "--steps", "100000")
    metrics = folder / "out/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume continues after it" in output
    saved = max(int(p.name[5:]) for p in (folder / "out/checkpoints").iterdir())
    assert rows(folder)[-1]["step"] == saved >= 2
    table = train(folder, "--sampler", kind, "--resume", "true", "--steps", str(saved + 1))
    assert [row["step"] for row in table] == list(range(saved + 2))


def test_bad_input_is_refused_in_one_line_before_a_model_is_loaded(folder):
    (folder / "train.jsonl").write_text('{"prompt": "t9", "word": "1"}\n{"prompt": }\n')
    process = command(folder)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "train.jsonl:2" in output and "Traceback" not in output
