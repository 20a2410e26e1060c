"""The run: sample, reward, score, update, publish, prove, repeat.

One process holds the sampler and the learner. They take turns, so the KV cache gives its memory
back while the learner works, and the weights that a step ends with are the weights that the next
one samples from.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from warpo.engine.config.policy import Config
from warpo.engine.learner.learner import Learner
from warpo.engine.plan.settle import settle
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.rollout.collect import Rollouts
from warpo.engine.run import checkpoint, plot
from warpo.engine.run.log import Log, read_rows
from warpo.engine.run.loop import Checkpoints, Contents, Run, evaluate_before_first_step, open_run
from warpo.engine.run.resume import is_complete
from warpo.engine.trainers.policy.build import build


def run(config: Config, ranks: Ranks = ONE_RANK) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or a failed step; a checkpoint of the last complete step is left,
            unless its state has diverged.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the end of the terminal; likewise.
    """
    config, settled = settle(config)
    with open_run(config, ranks, settled) as run:
        log = run.log
        if not is_complete(config, run.saved):
            with (
                build(config, run) as (rollouts, learner, weights),
                _checkpoints(config, run, rollouts, learner) as checkpoints,
            ):
                log.say(_describe(config, learner))
                if learner.adapters is not None:
                    log.say(str(learner.adapters))
                log.say(str(weights))
                _prepare(config, run, rollouts, learner, checkpoints)
                weights.publish(learner.step)
                weights.verify(rollouts.probe_sequences)
                evaluate_before_first_step(
                    log, learner.step, partial(rollouts.evaluate, learner.step)
                )
                while learner.step < config.steps:
                    log.start_step()
                    batch, metrics = rollouts.collect(learner.step + 1)
                    metrics |= learner.update(batch)
                    saves = checkpoints.is_due()
                    try:
                        metrics |= weights.publish(learner.step)
                        # the next step's rollouts prove the others, before the weights move on
                        probe = saves or config.rollout.truncated
                        probe = probe or rollouts.evaluates_after(learner.step)
                        metrics |= weights.verify(batch.probed_tokens, probe=probe)
                        metrics |= rollouts.evaluate(learner.step)
                    finally:
                        log.write(learner.step, metrics)
                    if saves:
                        checkpoints.save()
        _report(Path(config.output_dir) / "metrics.jsonl", log)


def _describe(config: Config, learner: Learner) -> str:
    millions = sum(p.numel() for p in learner.model.parameters()) / 1e6
    return (
        f"{config.model}: {millions:.1f} M parameters, {config.dtype} on {learner.device}, "
        f"sampled by {config.sampler}; {config.algorithm}: {', '.join(learner.algorithm.models)}"
    )


def _checkpoints(config: Config, run: Run, rollouts: Rollouts, learner: Learner) -> Checkpoints:
    contents = Contents(
        model=learner.adapters or learner.model,
        tokenizer=learner.tokenizer,
        parts={**learner.stateful, "stream": rollouts.stream},
        check=lambda: learner.check_state(rollouts.probe_sequences),
    )
    return Checkpoints(config, run, learner.progress, contents)


def _prepare(
    config: Config, run: Run, rollouts: Rollouts, learner: Learner, checkpoints: Checkpoints
) -> None:
    """Bring learner and reference to the state that the next step starts from."""
    if run.saved:
        checkpoints.load()
        if learner.adapters is not None:
            learner.adapters.merge()
        learner.reference.load(learner.model, learner.step)
        run.say_resumed()
        for change in (rollouts.stream.changes, learner.pretraining_changes):
            if change:
                run.log.say(change)
        learner.progress.mark()
        return
    learner.progress.mark()
    checkpoint.rehearse(
        config.output_dir,
        learner.adapters or learner.model,
        learner.tokenizer,
        parameters=learner.stepped,
        parts=learner.stateful,
    )
    learner.reference.begin(learner.model)
    checkpoints.save()


def _report(metrics_path: Path, log: Log) -> None:
    """Report what was learned, in a line and in a picture."""
    evaluated = [row for row in read_rows(metrics_path) if "eval/accuracy" in row]
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        log.say(
            f"held-out accuracy: {first['eval/accuracy']:.3f} after step {first['step']}, "
            f"{last['eval/accuracy']:.3f} after step {last['step']}"
        )
    log.say(f"learning curves: {plot.plot_run(metrics_path)}")
