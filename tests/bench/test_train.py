"""The comparison of training steps: its job, its figures and, slow, the whole command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from warpo.bench.environment import environment, processor
from warpo.bench.train import __main__ as command
from warpo.bench.train import plots, trl_side, warpo_side
from warpo.bench.train.__main__ import Shape, expected_s, job_of, main, parse
from warpo.bench.train.job import Clock, make, reward
from warpo.bench.train.rows import goals_of, groups, row_of, table_of
from warpo.engine.data.prompts import load_prompts
from warpo.engine.models.files import load_tokenizer
from warpo.engine.models.model import eos_token_ids

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers/trl/site-packages"


def test_nothing_ends_a_completion_and_every_prompt_has_its_length(tmp_path):
    job = job_of(parse(["--quick"]), Shape("tiny", "vllm", 5), str(tmp_path))
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
    assert config.sampler == "vllm" and trl_side.sampling_of(job, True)["use_vllm"]
    without = replace(job, sampler="transformers")
    assert warpo_side.config_of(without, str(tmp_path / "out")).sampler == "transformers"
    assert not trl_side.sampling_of(without, True)["use_vllm"]


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


def row(
    name: str, seconds: float, held: int, peak: int, sampler: str = "vllm", prompt_tokens: int = 128
) -> dict:
    phases = {"sample": seconds / 2, "verify": 0.02, "probe": 0.01}
    answer = {
        "steps": [{"step": seconds, "cpu": 1.0} | phases] * 3,
        "peaks": [peak],
        "resident_bytes": held,
        "imports_bytes": 100,
        "completion_tokens": 4096.0,
        "reward": 0.5,
        "versions": {"torch": "2"},
    }
    job = job_of(parse([]), Shape("tiny", sampler, prompt_tokens), "nowhere")
    return row_of(job, name, answer, weight_bytes=50)


def test_goals_compare_with_each_run_of_trl():
    rows = [
        row("warpo", 1.0, 200, 300),
        row("trl", 4.0, 240, 340),
        row("trl tuned", 1.6, 260, 360),
    ]
    goals = goals_of(rows)
    by_trainer = {name: [g for g in goals if g["against"] == name] for name in ("trl", "trl tuned")}
    reached = {name: [g["reached"] for g in found] for name, found in by_trainer.items()}
    assert reached["trl"] == pytest.approx([0.25, 1.0, 0.8])
    assert reached["trl tuned"] == pytest.approx([1.0 / 1.6, 1.0, 1.2])
    assert [g["met"] for g in by_trainer["trl"]] == [True, False, False]
    assert [g["met"] for g in by_trainer["trl tuned"]] == [False, False, True]
    (proof,) = (g for g in goals if g["against"] == "-")
    assert proof["reached"] == pytest.approx(0.03) and not proof["met"]
    assert "1000" in table_of(rows) and "prompts of 128 by vllm" in table_of(rows)
    assert goals_of(rows[1:]) == []


def test_rows_of_prompts_of_another_length_are_another_job():
    rows = [row(n, 1.0, 200, 300, "vllm", p) for p in (128, 512) for n in ("warpo", "trl")]
    assert [[r["prompt_tokens"] for r in job] for job in groups(rows)] == [[128] * 2, [512] * 2]


def test_a_row_without_a_phase_took_no_time_in_it():
    old = row("warpo", 1.0, 200, 300)
    del old["phases_s"]["verify"]
    (proof,) = goals_of([old])
    assert proof["reached"] == pytest.approx(0.01)
    assert "verify ms" in table_of([old])


def test_phases_are_drawn_for_each_job(tmp_path):
    rows = [
        row(name, 1.0, 200, 300, s) for s in ("vllm", "transformers") for name in ("warpo", "trl")
    ]
    del rows[0]["phases_s"]["verify"]
    assert plots.steps(rows, tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 10_000
    assert not plots.steps([{"trainer": "trl", "problem": "missing"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--group-size 1", "--group-size is 1, and must be at least 2"),
        ("--warm-up 0", "--warm-up is 0, and must be at least 1"),
        ("--new-tokens -3", "--new-tokens is -3"),
        ("--prompt-tokens 128 0", "--prompt-tokens has 0, and must be at least 1"),
        ("--lr 0", "--lr is 0.0, and must be above 0"),
        ("--models huge", "invalid choice: 'huge'"),
        ("--sampler sglang", "invalid choice: 'sglang'"),
        ("--no-steps --no-sync --no-scaling", "nothing to measure"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wrong(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_every_part_has_an_expected_time():
    assert len(expected_s(parse(["--quick"]))) == 2 * 3 + 1 + 3
    assert len(expected_s(parse(["--no-sync", "--no-scaling", "--rounds", "2"]))) == 2 * 3 * 3 * 2


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    def measure(runs, sides, rounds, started):
        runs.answers["warpo"] = {
            "steps": [{"step": 1.0, "cpu": 1.0, "sample": 1.0}],
            "peaks": [300],
            "resident_bytes": 200,
            "imports_bytes": 100,
            "completion_tokens": 1.0,
            "reward": 0.5,
            "versions": {},
        }
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Runs, "measure", measure)
    assert main(["--quick", "--out", str(tmp_path)]) == 130
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["trainer"] == "warpo" and kept["sampler"] == "vllm"
    assert kept["command"] == f"warpo bench train --quick --out {tmp_path}"
    assert {"machine", "versions", "date", "commit"} <= kept.keys()
    assert (tmp_path / "train.png").exists()


def test_a_result_says_where_when_and_how_it_was_measured():
    found = environment(["warpo", "bench", "train"], processor())
    assert found.keys() >= {"machine", "python", "torch", "commit", "date", "command"}
    assert found["command"] == "warpo bench train"


def test_a_sync_that_fails_halfway_keeps_its_rows_and_says_why(tmp_path, monkeypatch, capsys):
    def fail(words, peers, log):
        written = {"provider": "flat copy", "sampler_dtype": "float32"}
        (tmp_path / "resync.jsonl").write_text(json.dumps(written) + "\n")
        raise RuntimeError("no memory left")

    monkeypatch.setattr(command, "child", fail)
    words = ["--no-steps", "--no-scaling", "--out", str(tmp_path)]
    assert main(words) == 1
    kept = [json.loads(line) for line in (tmp_path / "resync.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in kept] == ["flat copy", "all"]
    assert kept[1]["machine"] and "weight sync: no memory left" in capsys.readouterr().out


def test_missing_peers_are_rows_that_name_the_command_that_installs_them(tmp_path, capfd):
    words = ["--quick", "--trainers", "trl", "--sampler", "transformers", "--no-sync"]
    words += ["--no-scaling", "--out", str(tmp_path), "--peers", str(tmp_path / "none")]
    assert main(words) == 1
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    assert "make peers" in json.loads(line)["problem"] and json.loads(line)["versions"]["torch"]
    shown = capfd.readouterr()
    assert "make peers" in shown.out and "[1/1, about " in shown.err


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="TRL is not installed: make peers")
@pytest.mark.parametrize("sampler", ["vllm", "transformers"])
def test_both_trainers_run_the_same_job(tmp_path, sampler):
    words = ["--quick", "--sampler", sampler, "--no-sync", "--no-scaling", "--peers", PEERS]
    start = [sys.executable, "-m", "warpo.bench.train", *words, "--out", tmp_path]
    subprocess.run(start, check=True, timeout=590, cwd=ROOT, env=os.environ)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["trainer"] for row in rows] == ["warpo", "trl", "trl tuned"]
    assert {row["completion_tokens"] for row in rows} == {8 * 8 * 64.0}
    for row in rows:
        # a random policy; both trainers score the same distribution
        assert 0.4 < row["reward"] < 0.6 and row["sampler"] == sampler
        assert all(row["phases_s"][phase] > 0 for phase in ("sample", "forward", "backward"))
        assert row["peak_above_imports_bytes"] > row["weight_bytes"]
        assert {"torch", "transformers"} <= row["versions"].keys()
        assert ("vllm" in row["versions"]) == (sampler == "vllm")
        assert {"machine", "date", "commit", "command"} <= row.keys()
    by_name = {row["trainer"]: row["phases_s"] for row in rows}
    assert (by_name["trl"]["score"] > 0) == (sampler == "vllm")
    assert by_name["trl tuned"]["score"] == 0
