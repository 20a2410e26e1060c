"""The run of an algorithm for control: step the environments, learn, evaluate, repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from warpo.engine import checkpoint, plot
from warpo.engine.checkpoint import Saved, Stateful
from warpo.engine.control.config import ControlConfig
from warpo.engine.control.environments import Environments, evaluate, spaces_of
from warpo.engine.control.ppo import PpoLearner
from warpo.engine.control.sac import SacLearner
from warpo.engine.device import learner_device
from warpo.engine.errors import TrainingError
from warpo.engine.loop import Schedule, raise_if, signals
from warpo.engine.metrics import RunLog, plain, read_rows
from warpo.engine.resume import claim, is_complete, tell

Metrics = dict[str, float]

LEARNERS: dict[str, type[SacLearner] | type[PpoLearner]] = {
    "sac": SacLearner,
    "ppo_gymnasium": PpoLearner,
}


class Run:
    """What a run works with, and how many environment steps it has done."""

    def __init__(self, config: ControlConfig, saved: Saved | None = None) -> None:
        spaces, device = spaces_of(config), learner_device(config)
        torch.manual_seed(config.seed)
        self.config, self.step = config, 0
        self.schedule = Schedule(config.checkpoint, saved)
        self.environments = Environments(config)
        self.learner = LEARNERS[config.algorithm](config, spaces, self.environments, device)

    @property
    def stateful(self) -> dict[str, Stateful]:
        return {**self.learner.stateful, "environments": self.environments}


def run(config: ControlConfig) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or training diverged.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the end of the terminal; a checkpoint of the last row
            is left.
    """
    spaces_of(config)  # what it refuses leaves no output_dir
    with claim(config) as saved:
        state = Run(config, saved)
        with closing(state.environments):
            if saved:
                state.step = checkpoint.load(saved, model=None, parts=state.stateful)
            with (
                RunLog(
                    config.output_dir,
                    config,
                    columns=state.learner.columns,
                    resume_step=saved.step if saved else None,
                ) as log,
                signals(log) as stop,
            ):
                tell(config, saved, log)
                if not is_complete(config, saved):
                    _train(state, log, stop, saved)
                _report(Path(config.output_dir) / "metrics.jsonl", state, log)


def _train(state: Run, log: RunLog, stop: Callable[[], bool], saved: Saved | None) -> None:
    _describe(state, log, saved)
    while state.step < state.config.steps:
        _iterate(state, log)
        if stop():
            _save(state, log)
        raise_if(stop)


def _describe(state: Run, log: RunLog, saved: Saved | None) -> None:
    config = state.config
    log.say(f"{config.environment}: {config.num_envs} environments, {config.algorithm}")
    if saved:
        log.say(f"resumed after step {state.step} from {saved.path}")


def _iterate(state: Run, log: RunLog) -> None:
    """Learn until the next row of metrics; evaluate and save where it is due."""
    config, before = state.config, state.step
    log.start_step()
    start = time.perf_counter()
    with log.phase("learn") as progress:
        taken, metrics = state.learner.iterate(before, progress)
    state.step += taken
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
    if _due(state, before, config.checkpoint.every_steps) or state.schedule.is_late:
        _save(state, log)


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


def _evaluation(state: Run, log: RunLog) -> Metrics:
    config = state.config
    with log.phase("evaluate"):
        returns = evaluate(
            state.learner.act, config.environment,
            episodes=config.evaluation.episodes, seed=config.seed,
        )  # fmt: skip
    return {"eval/return": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}


def _due(state: Run, before: int, every: int) -> bool:
    """Whether the run ends or passed a multiple of `every`."""
    passed = every > 0 and state.step // every > before // every
    return passed or state.step >= state.config.steps


def _save(state: Run, log: RunLog) -> None:
    config, schedule = state.config, state.schedule
    if schedule.saved == state.step:
        return
    # losses are squares of these
    if not state.learner.outputs(state.environments.observations).square().isfinite().all():
        raise TrainingError(
            f"step {state.step} is not saved, since the networks give no finite numbers: the run "
            f"has diverged. {checkpoint.last_good(config.output_dir)}"
        )
    log.flush()
    with log.phase("checkpoint"):
        checkpoint.save(
            config.output_dir, step=state.step, model=None, tokenizer=None, parts=state.stateful,
            keep=schedule.keep, settings=plain(config),
        )  # fmt: skip
    schedule.done(state.step)


def _report(metrics_path: Path, state: Run, log: RunLog) -> None:
    """What was learned, in a line and in a picture."""
    config, rows = state.config, read_rows(metrics_path)
    for name, what in (("episode/return", "training"), ("eval/return", "evaluation")):
        known = [row for row in rows if row.get(name) is not None]
        if len(known) > 1:
            log.say(
                f"return in {what}: {known[0][name]:.1f} after step {known[0]['step']}, "
                f"{known[-1][name]:.1f} after step {known[-1]['step']}"
            )
    title = f"{config.environment}, {config.algorithm}, {state.step} steps"
    log.say(f"learning curves: {plot.plot_run(metrics_path, state.learner.panels, title)}")
