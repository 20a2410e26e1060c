"""The run of an algorithm for control: step the environments, learn, evaluate, repeat."""

from __future__ import annotations

import math
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from warpo.engine.config.control import ControlConfig
from warpo.engine.errors import TrainingError
from warpo.engine.run import checkpoint, plot
from warpo.engine.run.checkpoint import Stateful
from warpo.engine.run.device import learner_device
from warpo.engine.run.log import Log, read_rows
from warpo.engine.run.loop import Checkpoints, Contents, Progress, open_run
from warpo.engine.run.resume import is_complete
from warpo.engine.trainers.control.environments import Environments, evaluate, spaces_of
from warpo.engine.trainers.control.ppo import PpoLearner
from warpo.engine.trainers.control.sac import SacLearner
from warpo.engine.trainers.control.sac_discrete import SacDiscreteLearner
from warpo.engine.trainers.control.sac_v import SacVLearner
from warpo.engine.trainers.control.trpo import TrpoLearner
from warpo.engine.types import Metrics

Learner = SacLearner | SacVLearner | SacDiscreteLearner | PpoLearner | TrpoLearner

LEARNERS: dict[str, type[Learner]] = {
    "sac": SacLearner,
    "sac_v": SacVLearner,
    "sac_discrete": SacDiscreteLearner,
    "ppo_gymnasium": PpoLearner,
    "trpo_gymnasium": TrpoLearner,
}


class ControlRun:
    """Parts of a run, and the number of environment steps it has done."""

    def __init__(self, config: ControlConfig) -> None:
        spaces, device = spaces_of(config), learner_device(config)
        torch.manual_seed(config.seed)
        self.config, self.progress = config, Progress()
        self.environments = Environments(config)
        self.learner = LEARNERS[config.algorithm](config, spaces, self.environments, device)

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def stateful(self) -> dict[str, Stateful]:
        return {**self.learner.stateful, "environments": self.environments}

    def check_state(self) -> None:
        """Prove before a save that training can go on.

        Raises:
            TrainingError: the networks give no finite numbers.
        """
        # losses are squares of these
        if not self.learner.outputs(self.environments.observations).square().isfinite().all():
            raise TrainingError(
                f"step {self.step} is not saved, since the networks give no finite numbers: the "
                f"run has diverged. {checkpoint.last_good(self.config.output_dir)}"
            )


def run(config: ControlConfig) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or training diverged.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the end of the terminal; a checkpoint of the last row
            is left.
    """
    spaces_of(config)  # what it refuses leaves no output_dir
    columns = LEARNERS[config.algorithm].columns
    with open_run(config, columns=columns) as run:
        state = ControlRun(config)
        with closing(state.environments):
            contents = Contents(parts=state.stateful, check=state.check_state)
            checkpoints = Checkpoints(config, run, state.progress, contents)
            if not is_complete(config, run.saved):
                run.log.say(
                    f"{config.environment}: {config.num_envs} environments, {config.algorithm}"
                )
                checkpoints.load()
                run.say_resumed()
                while state.step < config.steps:
                    _iterate(state, run.log, checkpoints)
                    if run.stop():
                        checkpoints.save()
                    run.raise_if_stopped()
            _report(Path(config.output_dir) / "metrics.jsonl", config, run.log)


def _iterate(state: ControlRun, log: Log, checkpoints: Checkpoints) -> None:
    """Learn until the next row of metrics; evaluate and save where it is due."""
    config, before = state.config, state.step
    log.start_step()
    start = time.perf_counter()
    with log.phase("learn") as progress:
        taken, metrics = state.learner.iterate(before, progress)
    state.progress.step += taken
    metrics["perf/env_steps_per_s"] = taken / (time.perf_counter() - start)
    metrics |= _episodes(state.environments.take_finished())
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{', '.join(bad)} is not finite between steps {before} and {state.step}: lower "
            f"lr = {config.lr:g}, or resume from an earlier checkpoint"
        )
    if config.evaluation.every_steps and _due(state, before, config.evaluation.every_steps):
        metrics |= _evaluation(state, log)
    log.write(state.step, metrics)
    if _due(state, before, config.checkpoint.every_steps) or checkpoints.is_late():
        checkpoints.save()


def _episodes(finished: list[tuple[float, int]]) -> Metrics:
    """Means over the episodes that ended; nothing where none has."""
    if not finished:
        return {}
    returns, lengths = zip(*finished, strict=True)
    return {
        "episode/return": float(np.mean(returns)),
        "episode/length": float(np.mean(lengths)),
        "episode/count": float(len(finished)),
    }


def _evaluation(state: ControlRun, log: Log) -> Metrics:
    config = state.config
    with log.phase("evaluate"):
        returns = evaluate(
            state.learner.act,
            config.environment,
            episodes=config.evaluation.episodes,
            seed=config.seed,
        )
    return {"eval/return": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}


def _due(state: ControlRun, before: int, every: int) -> bool:
    """True if the run ends or passed a multiple of `every`."""
    passed = every > 0 and state.step // every > before // every
    return passed or state.step >= state.config.steps


def _report(metrics_path: Path, config: ControlConfig, log: Log) -> None:
    """Say what was learned, in a line and in a picture."""
    rows = read_rows(metrics_path)
    for name, what in (("episode/return", "training"), ("eval/return", "evaluation")):
        known = [row for row in rows if row.get(name) is not None]
        if len(known) > 1:
            log.say(
                f"return in {what}: {known[0][name]:.1f} after step {known[0]['step']}, "
                f"{known[-1][name]:.1f} after step {known[-1]['step']}"
            )
    title = f"{config.environment}, {config.algorithm}, {rows[-1]['step'] if rows else 0} steps"
    panels = LEARNERS[config.algorithm].panels
    log.say(f"learning curves: {plot.plot_run(metrics_path, panels, title)}")
