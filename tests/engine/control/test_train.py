import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from warpo.engine import checkpoint
from warpo.engine.config_file import read_tree
from warpo.engine.control import train
from warpo.engine.control.config import ControlConfig
from warpo.engine.errors import CheckpointError, ConfigError, TrainingError
from warpo.engine.metrics import read_rows

EXAMPLES = Path(__file__).parents[3] / "examples"
ALGORITHMS = ("sac", "ppo_gymnasium")


def rows_of(config):
    """metrics.jsonl without timings."""
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in read_rows(Path(config.output_dir) / "metrics.jsonl")
    ]


def weights_of(config):
    state = torch.load(checkpoint.latest(config.output_dir) / "trainer.pt", weights_only=True)
    return state["parts"]


def assert_equal(mine, other):
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for name in mine:
            assert_equal(mine[name], other[name])
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other)
    else:
        assert mine == other


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(config, tmp_path, algorithm):
    whole = config(algorithm, steps=80, evaluation={"every_steps": 16, "episodes": 2})
    train.run(whole)
    half = replace(whole, output_dir=str(tmp_path / "half"), steps=48)
    train.run(half)
    assert rows_of(half) == rows_of(whole)[:3]
    resumed = replace(half, steps=80, resume=True)
    torch.manual_seed(99)
    train.run(resumed)
    assert rows_of(resumed) == rows_of(whole)
    assert_equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_leaves_metrics_plot_and_checkpoints(config, algorithm, capsys):
    settings = config(
        algorithm, evaluation={"every_steps": 20, "episodes": 3},
        checkpoint={"every_steps": 16, "keep": 2},
    )  # fmt: skip
    train.run(settings)
    rows, out = rows_of(settings), Path(settings.output_dir)
    assert [row["step"] for row in rows] == [16, 32, 48]
    assert ["eval/return" in row for row in rows] == [False, True, True]
    assert rows[0]["episode/count"] > 0 and 3 <= rows[0]["episode/length"] <= 5
    assert sorted(entry.name for entry in (out / "checkpoints").iterdir()) == [
        "step-000032", "step-000048",
    ]  # fmt: skip
    assert (out / "learning.png").stat().st_size > 10_000
    assert list((out / "tensorboard").iterdir())
    said = capsys.readouterr().out
    assert "return in training" in said and "eval" in said and "steps/s" in said


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ctrl_c_ends_a_run_after_a_row_and_keeps_it(config, tmp_path, algorithm, monkeypatch):
    whole = config(algorithm)
    train.run(whole)
    stopped = replace(whole, output_dir=str(tmp_path / "stopped"))
    learner = train.LEARNERS[algorithm]
    iterate, calls = learner.iterate, []

    def interrupted(self, step, progress):
        calls.append(step)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return iterate(self, step, progress)

    monkeypatch.setattr(learner, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(stopped)
    assert [row["step"] for row in rows_of(stopped)] == [16, 32]
    assert checkpoint.latest(stopped.output_dir).name == "step-000032"
    train.run(replace(stopped, resume=True))
    assert rows_of(stopped) == rows_of(whole)


def test_the_seed_decides_the_run(config, tmp_path):
    first = config()
    train.run(first)
    again = replace(first, output_dir=str(tmp_path / "again"))
    other = replace(first, output_dir=str(tmp_path / "other"), seed=1)
    train.run(again)
    train.run(other)
    assert rows_of(again) == rows_of(first) != rows_of(other)


def test_the_last_row_of_sac_ends_at_the_last_step(config):
    settings = config("sac", steps=22)
    train.run(settings)
    assert [row["step"] for row in rows_of(settings)] == [16, 22]


def test_a_run_does_not_overwrite_another(config):
    settings = config()
    train.run(settings)
    with pytest.raises(ConfigError, match="holds the metrics of a run: pass --resume"):
        train.run(settings)


def test_a_checkpoint_of_other_networks_is_refused(config):
    settings = config()
    train.run(settings)
    wider = replace(settings, resume=True, ppo=replace(settings.ppo, hidden_size=9))
    with pytest.raises(CheckpointError, match="the state of network does not fit"):
        train.run(wider)
    with pytest.raises(CheckpointError, match="keeps environments, network, optimizer, this run"):
        train.run(replace(config("sac"), resume=True))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train.run(replace(settings, output_dir=settings.output_dir + "x", resume=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_diverges_stops_and_says_what_to_lower(config, algorithm):
    with pytest.raises(TrainingError, match="(loss/policy.*|actions.*) not finite.*: lower lr"):
        train.run(config(algorithm, lr=1e30))


def mean_return(config: ControlConfig) -> float:
    """Of the last evaluation."""
    train.run(config)
    rows = read_rows(Path(config.output_dir) / "metrics.jsonl")
    print(json.dumps([[row["step"], row["eval/return"]] for row in rows if "eval/return" in row]))
    return np.float64(rows[-1]["eval/return"])


@pytest.mark.timeout(240)  # 12 s of one core of an AMD EPYC, with neighbours a minute
@pytest.mark.slow
def test_ppo_balances_the_pole_in_40_thousand_steps(tmp_path):
    overrides = ["--output_dir", str(tmp_path / "run"), "--steps", "40000"]
    config = read_tree(ControlConfig, EXAMPLES / "ppo_gymnasium.yaml", overrides)
    assert mean_return(config) > 450


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sac_swings_the_pendulum_up_in_8_thousand_steps(tmp_path):
    overrides = ["--output_dir", str(tmp_path / "run")]
    config = read_tree(ControlConfig, EXAMPLES / "sac.yaml", overrides)
    assert mean_return(config) > -250
