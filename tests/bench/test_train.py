"""The comparison of training steps: its job, its figures and, slow, the whole command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from warpo.bench.environment import environment, processor
from warpo.bench.train import warpo_side
from warpo.bench.train.__main__ import goals_of, job_of, main, parse, row_of, table_of
from warpo.bench.train.job import Clock, make, reward
from warpo.engine.data import load_prompts
from warpo.engine.model import eos_token_ids, load_tokenizer

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers/trl"


def test_nothing_ends_a_completion_and_every_prompt_has_its_length(tmp_path):
    job = job_of(parse(["--quick", "--prompt-tokens", "5"]), "tiny", str(tmp_path))
    weight_bytes = make(job)
    model = AutoModelForCausalLM.from_pretrained(job.model_path)
    tokenizer = load_tokenizer(job.model_path)
    assert eos_token_ids(model, tokenizer) == []
    assert weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    prompts = load_prompts(job.prompts_path, tokenizer, 5)
    assert len(prompts) == job.prompts_per_step * (job.steps + job.warm_up)
    assert {len(prompt.token_ids) for prompt in prompts} == {5}
    config = warpo_side.config_of(job, str(tmp_path / "out"))
    assert config.rollout.max_new_tokens == 64 and config.loss.kl_coef == 0


def test_the_reward_is_the_share_of_even_tokens():
    assert reward(["w0 w11 w32 w7", "", "w8"]) == [0.5, 0.0, 1.0]


def test_a_step_is_the_sum_of_its_phases():
    clock = Clock()
    clock.end_step()
    with clock.phase("sample"):
        sum(range(100_000))
    clock.end_step(publish=0.0)
    (step,) = clock.steps
    parts = (step[phase] for phase in ("sample", "publish", "other"))
    assert step["step"] == pytest.approx(sum(parts)) and step["other"] >= 0 < step["sample"]


def test_goals_compare_with_each_run_of_trl(tmp_path):
    job = job_of(parse([]), "tiny", str(tmp_path))

    def row(name: str, seconds: float, held: int, peak: int) -> dict:
        answer = {
            "steps": [{"step": seconds, "cpu": 1.0, "sample": seconds / 2}] * 3,
            "peaks": [peak], "resident_bytes": held, "imports_bytes": 100,
            "completion_tokens": 4096.0, "reward": 0.5, "versions": {"torch": "2"},
        }  # fmt: skip
        return row_of(job, name, answer, weight_bytes=50)

    rows = [
        row("warpo", 1.0, 200, 300), row("trl", 4.0, 240, 340),
        row("trl tuned", 1.6, 260, 360),
    ]  # fmt: skip
    goals = goals_of(rows)
    by_trainer = {name: [g for g in goals if g["against"] == name] for name in ("trl", "trl tuned")}
    reached = {name: [g["reached"] for g in found] for name, found in by_trainer.items()}
    assert reached["trl"] == pytest.approx([0.25, 1.0, 0.8])
    assert reached["trl tuned"] == pytest.approx([1.0 / 1.6, 1.0, 1.2])
    assert [g["met"] for g in by_trainer["trl"]] == [True, False, False]
    assert [g["met"] for g in by_trainer["trl tuned"]] == [False, False, True]
    assert "1000" in table_of(rows)
    assert goals_of(rows[1:]) == []


def test_a_result_says_where_when_and_how_it_was_measured():
    found = environment("warpo.bench.train", processor())
    assert found.keys() >= {"machine", "python", "torch", "commit", "date", "command"}
    assert found["command"].startswith("python -m warpo.bench.train")


def test_missing_peers_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    words = ["train", "--quick", "--trainers", "trl", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--peers", str(tmp_path / "none")])
    with pytest.raises(RuntimeError, match="make peers"):
        main()


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="TRL is not installed: make peers")
def test_both_trainers_run_the_same_job(tmp_path):
    command = [sys.executable, "-m", "warpo.bench.train", "--quick", "--peers", PEERS]
    subprocess.run([*command, "--out", tmp_path], check=True, timeout=590, cwd=ROOT, env=os.environ)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["trainer"] for row in rows] == ["warpo", "trl", "trl tuned"]
    assert {row["completion_tokens"] for row in rows} == {8 * 8 * 64.0}
    for row in rows:
        # a random policy; both trainers score the same distribution
        assert 0.4 < row["reward"] < 0.6
        assert all(row["phases_s"][phase] > 0 for phase in ("sample", "forward", "backward"))
        assert row["peak_above_imports_bytes"] > row["weight_bytes"]
        assert {"torch", "transformers", "vllm"} <= row["versions"].keys()
        assert {"machine", "date", "commit", "command"} <= row.keys()
    by_name = {row["trainer"]: row["phases_s"] for row in rows}
    assert by_name["trl"]["score"] > 0 == by_name["trl tuned"]["score"]
