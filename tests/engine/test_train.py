"""Whole runs, on the real samplers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from tests.engine.runs import rows, train
from warpo.engine.config import load_config
from warpo.engine.errors import RewardError
from warpo.engine.train import run


def test_a_run_leaves_rows_curves_and_a_model_that_transformers_loads(folder, kind):
    table = train(folder, "--sampler", kind)
    assert [row["step"] for row in table] == [0, 1, 2, 3, 4]
    assert ["eval/accuracy" in row for row in table] == [True, False, True, False, True]
    last = table[-1]
    assert last["publish/version"] == 4
    assert last["publish/bytes"] == 0 and last["publish/extra_weight_bytes"] == 0
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
    assert whole == parts


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
