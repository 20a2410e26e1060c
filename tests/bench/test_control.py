"""Control beside Stable-Baselines3: its figures and, slow, the whole command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from warpo.bench.control.__main__ import goals_of, main, plot, summaries, table_of

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers/stable_baselines3/site-packages"


def row(trainer, seed, value, seconds=2.0):
    return {
        "trainer": trainer,
        "algorithm": "sac",
        "environment": "Pendulum-v1",
        "seed": seed,
        "return": value,
        "curve_mean": value - 100,
        "run_s": seconds,
        "cpu_s": seconds / 2,
        "curve": [[1000, value - 200], [2000, value]],
    }


def test_the_goal_is_the_mean_return_of_the_other_less_the_larger_spread():
    rows = [row("warpo", 0, -150.0), row("warpo", 1, -170.0, 4.0)]
    rows += [row("stable-baselines3", 0, -140.0), row("stable-baselines3", 1, -142.0)]
    found = summaries(rows)
    mine = found["sac", "warpo"]
    assert (mine["return"], mine["run_s"], mine["seeds"]) == (-160.0, 3.0, 2)
    assert mine["return_std"] == pytest.approx(200**0.5)
    (goal,) = goals_of(found)
    assert goal["goal"] == pytest.approx(-141 - 200**0.5) and not goal["met"]
    for value, met in ((-150.0, False), (-141.5, True)):
        (other,) = goals_of(summaries([row("warpo", 0, value), *rows[2:]]))
        assert other["met"] == met
    assert goals_of(summaries(rows[:2])) == []
    assert "-160.0 +- 14.1" in table_of(found, [goal]) and "missed" in table_of(found, [goal])


def test_the_curves_are_drawn(tmp_path):
    rows = [row(name, seed, -150.0) for name in ("warpo", "stable-baselines3") for seed in (0, 1)]
    plot(rows, tmp_path / "control.png")
    assert (tmp_path / "control.png").stat().st_size > 10_000


def test_a_missing_peer_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    words = ["control", "--trainers", "stable-baselines3", "--steps", "64", "--seeds", "1"]
    words += ["--out", str(tmp_path), "--peers", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(RuntimeError, match="make peers"):
        main()


@pytest.mark.slow
@pytest.mark.skipif(
    not PEERS.exists(),
    reason="Stable-Baselines3 is not installed: make peers",
)
def test_both_trainers_run_the_same_steps(tmp_path):
    command = [sys.executable, "-m", "warpo.bench.control", "--peers", PEERS, "--out", tmp_path]
    options = ["--steps", "1024", "--seeds", "1", "--episodes", "2"]
    subprocess.run([*command, *options], check=True, timeout=590, cwd=ROOT, env=os.environ)
    rows = [json.loads(line) for line in (tmp_path / "control.jsonl").read_text().splitlines()]
    runs = [(row["algorithm"], row["trainer"], row["steps"]) for row in rows]
    assert runs == [
        (algorithm, trainer, 1024)
        for algorithm in ("sac", "ppo_gymnasium", "trpo_gymnasium")
        for trainer in ("warpo", "stable-baselines3")
    ]
    for row in rows:
        assert row["run_s"] > row["cpu_s"] / 2 > 0 and row["threads"] == 1
        assert {
            "gymnasium",
            "stable-baselines3",
            "sb3-contrib",
            "machine",
            "date",
            "commit",
        } <= row.keys()
