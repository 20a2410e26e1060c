import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.examples.configs import config_of
from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import read_tree
from warpo.engine.errors import CheckpointError, ConfigError, TrainingError
from warpo.engine.run import checkpoint
from warpo.engine.run.log import read_rows
from warpo.engine.trainers.control import train

EXAMPLES = Path(__file__).parents[4] / "examples"
ALGORITHMS = ("sac", "sac_v", "sac_discrete", "ppo_gymnasium", "trpo_gymnasium")
# One of each kind of loop, for what the learners do not decide.
LOOPS = ("sac", "ppo_gymnasium")


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


@pytest.mark.parametrize("algorithm", LOOPS)
def test_a_run_leaves_metrics_plot_and_checkpoints(config, algorithm, capsys):
    settings = config(
        algorithm,
        evaluation={"every_steps": 20, "episodes": 3},
        checkpoint={"every_steps": 16, "keep": 2},
    )
    train.run(settings)
    rows, out = rows_of(settings), Path(settings.output_dir)
    assert [row["step"] for row in rows] == [16, 32, 48]
    assert ["eval/return" in row for row in rows] == [False, True, True]
    assert rows[0]["episode/count"] > 0 and 3 <= rows[0]["episode/length"] <= 5
    assert sorted(entry.name for entry in (out / "checkpoints").iterdir()) == [
        "step-000032",
        "step-000048",
    ]
    assert (out / "learning.png").stat().st_size > 10_000
    assert list((out / "tensorboard").iterdir())
    said = capsys.readouterr().out
    assert "return in training" in said and "eval" in said and "steps/s" in said


@pytest.mark.parametrize("algorithm", LOOPS)
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
    with pytest.raises(ConfigError, match="a checkpoint, step-000048: pass --resume to continue"):
        train.run(settings)


def test_a_checkpoint_of_other_networks_is_refused(config):
    settings = config()
    train.run(settings)
    wider = replace(settings, resume=True, steps=64, ppo=replace(settings.ppo, hidden_size=9))
    with pytest.raises(CheckpointError, match="the state of network does not fit"):
        train.run(wider)
    for name, value in {"seed": 1, "num_envs": 1, "algorithm": "sac"}.items():
        other = config(**{name: value} if name != "algorithm" else {"algorithm": value})
        with pytest.raises(ConfigError, match=f"{name} = {value}, but the run in .* cannot be"):
            train.run(replace(other, resume=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_diverges_stops_and_says_what_to_lower(config, algorithm):
    with pytest.raises(TrainingError, match="(loss/.*|actions.*) not finite.*: lower lr"):
        train.run(config(algorithm, lr=1e30))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_diverged_state_is_not_saved_and_the_last_good_one_stays(config, algorithm):
    """A resumed run has the learning rate of its own settings, which here is absurd."""
    settings = config(algorithm, checkpoint={"every_steps": 16, "keep": 1}, steps=16)
    train.run(settings)
    with pytest.raises(TrainingError):
        train.run(replace(settings, resume=True, steps=160, lr=1e20))
    names = [path.name for path in (Path(settings.output_dir) / "checkpoints").iterdir()]
    assert names == ["step-000016"]


@pytest.mark.slow
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path):
    settings = (EXAMPLES / "sac.yaml").read_text()
    (tmp_path / "config.yaml").write_text(settings)
    ours, its = pty.openpty()

    def take_the_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    words = "train config.yaml --output_dir out --steps 100000 --sac.steps_per_row 20"
    process = subprocess.Popen(
        [sys.executable, "-m", "warpo.engine.cli", *words.split(), "--sac.learning_starts", "10"],
        cwd=tmp_path,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=take_the_terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(its)
    metrics, deadline = tmp_path / "out/metrics.jsonl", time.monotonic() + 120
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 10_000)
        os.close(ours)
        process.wait(timeout=60)
    finally:
        process.kill()
    last = read_rows(metrics)[-1]["step"]
    assert checkpoint.latest(tmp_path / "out").name == f"step-{last:06d}"


def mean_return(config: ControlConfig) -> float:
    """Mean return of the last evaluation."""
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


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_trpo_balances_the_pole_in_40_thousand_steps(tmp_path):
    overrides = ["--output_dir", str(tmp_path / "run"), "--steps", "40000"]
    config = read_tree(ControlConfig, EXAMPLES / "trpo_gymnasium.yaml", overrides)
    assert mean_return(config) > 450


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sac_swings_the_pendulum_up_in_8_thousand_steps(tmp_path):
    overrides = ["--output_dir", str(tmp_path / "run")]
    config = read_tree(ControlConfig, EXAMPLES / "sac.yaml", overrides)
    assert mean_return(config) > -250


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sac_with_a_value_function_swings_the_pendulum_up_in_6_thousand_steps(tmp_path):
    file, overrides = config_of("sac_v")
    overrides = [*overrides, "--output_dir", str(tmp_path / "run"), "--steps", "6000"]
    assert mean_return(read_tree(ControlConfig, file, overrides)) > -250


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_discrete_sac_balances_the_pole_in_5_thousand_steps(tmp_path):
    overrides = ["--output_dir", str(tmp_path / "run"), "--steps", "5000"]
    config = read_tree(ControlConfig, EXAMPLES / "sac_discrete.yaml", overrides)
    assert mean_return(config) > 450
