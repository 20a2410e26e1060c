"""The run: sample, reward, score, update, publish, prove, repeat.

One process holds the sampler and the learner. They take turns, so the KV cache gives its memory
back while the learner works, and the weights that a step ends with are the weights that the next
one samples from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from warpo.engine import checkpoint, mismatch, plot
from warpo.engine.advantages import estimate
from warpo.engine.batch import Batch, Rollout
from warpo.engine.build import Parts, build, load_reference, make_reference, renew_reference
from warpo.engine.checkpoint import Saved
from warpo.engine.config import Config
from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.loop import (
    Schedule,
    check_state,
    checkpoint_on_error,
    due,
    raise_if,
    save,
    signals,
)
from warpo.engine.metrics import ReportProgress, RunLog, read_rows
from warpo.engine.offline.losses import preference_gradients, supervised_gradients
from warpo.engine.pairs import pair_minibatches
from warpo.engine.pass_at_k import pass_at_k, powers_of_two
from warpo.engine.probe import probe_weights
from warpo.engine.resume import claim, is_complete, tell
from warpo.engine.resync import Resync
from warpo.engine.rollouts import (
    accuracy,
    collect,
    generate,
    greedy,
    reward,
    sampling_options,
    source_means,
)
from warpo.engine.step import (
    EQUAL_LOGPROBS,
    StepResult,
    accumulate_gradients,
    apply_gradients,
    loss_and_gradient,
    make_minibatches,
    score_rollouts,
    tokens_scored,
)
from warpo.engine.step_metrics import step_metrics
from warpo.kernels.objectives import Objective
from warpo.kernels.preferences import Preference

Metrics = dict[str, float]


def run(config: Config) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or a failed step; a checkpoint of the last complete step is left,
            unless its state has diverged.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the end of the terminal; likewise.
    """
    with (
        claim(config) as saved,
        RunLog(config.output_dir, config, resume_step=saved.step if saved else None) as log,
        signals(log) as stop,
    ):
        tell(config, saved, log)
        if not is_complete(config, saved):
            _train(config, log, stop, saved)
        _report(Path(config.output_dir) / "metrics.jsonl", log)


def _train(config: Config, log: RunLog, stop: Callable[[], bool], saved: Saved | None) -> None:
    schedule = Schedule(config.checkpoint, saved)
    with log.phase("load"):
        parts = build(config)

    def save_parts() -> None:
        _save(config, parts, log, schedule)

    with parts.rewards, checkpoint_on_error(parts, log, save_parts, schedule):
        _prepare(config, parts, log, stop, saved, schedule)
        while parts.step < config.steps:
            metrics, sequences = _step(config, parts, log, stop)
            try:
                metrics |= _publish(config, parts, log, sequences)
                metrics |= _evaluation(config, parts, log, stop)
            finally:
                log.write(parts.step, metrics)
            if schedule.is_due(parts.step, config.steps):
                save_parts()


def _prepare(
    config: Config,
    parts: Parts,
    log: RunLog,
    stop: Callable[[], bool],
    saved: Saved | None,
    schedule: Schedule,
) -> None:
    """Bring learner, reference and sampler to the state that the next step starts from."""
    millions = sum(p.numel() for p in parts.model.parameters()) / 1e6
    log.say(
        f"{config.model}: {millions:.1f} M parameters, {config.dtype} on {parts.device}, "
        f"sampled by {config.sampler}; {config.algorithm}: {', '.join(parts.algorithm.models)}"
    )
    log.say(_describe(parts.resync))
    if saved:
        parts.step = checkpoint.load(saved, model=parts.model, parts=parts.stateful)
        load_reference(config, parts)
        log.say(f"resumed after step {parts.step} from {saved.path}")
        for change in parts.changes:
            log.say(change)
    parts.boundary = parts.position()
    if not saved:
        learned = [p for group in parts.optimizer.param_groups for p in group["params"]]
        checkpoint.rehearse(config.output_dir, parts.model, parts.tokenizer, learned)
        make_reference(config, parts)
        _save(config, parts, log, schedule)
    _publish(config, parts, log, parts.probe_sequences)
    # a run may have ended within the evaluation after its checkpoint
    if config.evaluation.every_steps and not log.is_evaluated(parts.step):
        log.start_step()
        if evaluated := _evaluation(config, parts, log, stop):
            log.add(parts.step, evaluated)


def _describe(resync: Resync) -> str:
    if resync.mode == "alias":
        return "resync: alias, learner and sampler share one copy of the weights; 0 bytes to copy"
    why = f", as {resync.reason}" if resync.reason else ""
    return f"resync: copy, {resync.extra_bytes / 1e6:.1f} MB of weights twice{why}"


def _step(
    config: Config, parts: Parts, log: RunLog, stop: Callable[[], bool]
) -> tuple[Metrics, list[list[int]]]:
    """Sample, reward, score and update; returns metrics, and sequences to probe with."""
    step = parts.step + 1
    log.start_step()
    rollouts, metrics = collect(config, parts, log, stop, step)
    with log.phase("release"):
        parts.sampler.release_kv()
    probed = mismatch.spread(rollouts, config.probe.num_sequences)
    with log.phase("score"):
        drift = mismatch.Drift(parts.model, probed, config.rollout.temperature)
        rollouts, saving = _score(config, parts, log, rollouts, drift)
    with log.phase("advantages"):
        rollouts, estimated = estimate(
            parts.algorithm, rollouts, config.rollout.group_size, parts.adaptive
        )
    raise_if(stop)
    with log.phase("update") as progress:
        updated = _update(config, parts, rollouts, progress, drift)
    metrics |= saving | updated | estimated
    if "kl/approx" in metrics:
        metrics["kl/mean"] = metrics["kl/ref" if parts.algorithm.kl_coef else "kl/approx"]
        metrics["kl/coef"] = parts.adaptive.kl_coef
        # of the old policy where that is the reference: the first update finds none of it
        own = "kl/ref_last" if parts.algorithm.previous_reference else "kl/mean"
        parts.adaptive.adapt(parts.algorithm, metrics[own])
    renew_reference(config, parts, step)
    parts.step, parts.whole, parts.boundary = step, True, parts.position()
    return metrics, [r.prompt_ids + r.completion.token_ids for r in probed]


def _score(
    config: Config, parts: Parts, log: RunLog, rollouts: list[Rollout], drift: mismatch.Drift
) -> tuple[list[Rollout], Metrics]:
    """The rollouts with the scores that the algorithm needs, and what not scoring saved.

    old_logprobs/tokens_saved: tokens that the learner's extra forward pass would have read, in a
    step that did without. Its seconds are the growth of perf/score_s in the same run with
    probe.num_sequences = 0, where nothing shows that the sampler's logprobs serve.
    """
    recompute_old = _recompute_old(config, parts, log, rollouts, drift)
    scored = score_rollouts(
        rollouts, parts.model, parts.reference, parts.critic,
        temperature=config.rollout.temperature,
        token_budget=config.update.token_budget,
        recompute_old=recompute_old,
    )  # fmt: skip
    return scored, {
        "old_logprobs/recomputed": float(recompute_old),
        "old_logprobs/tokens_saved": (
            0.0 if recompute_old else float(tokens_scored(rollouts, config.update.token_budget))
        ),
    }


def _recompute_old(
    config: Config, parts: Parts, log: RunLog, rollouts: list[Rollout], drift: mismatch.Drift
) -> bool:
    """Whether old_logprobs are the learner's; if not, those of the sampler serve for all rollouts.

    They serve where nothing corrects for the sampler, every token can be drawn, and the learner
    gives a completion of every prompt the same logprobs.
    """
    objective = parts.algorithm.objective
    correction = objective.correction if isinstance(objective, Objective) else None
    if correction not in (None, "none"):
        return True
    if not config.rollout.truncated and drift.sampling_difference <= EQUAL_LOGPROBS:
        judges = mismatch.one_of_each_group(rollouts, config.rollout.group_size)
        drift.widen(judges, config.update.token_budget)
    if not config.rollout.truncated and drift.sampling_difference <= EQUAL_LOGPROBS:
        return False
    if correction == "none":
        why = (
            "rollout.top_p or top_k truncate what is sampled"
            if config.rollout.truncated
            else "probe.num_sequences = 0"
            if not config.probe.num_sequences
            else f"a logprob is {drift.sampling_difference:.1e} from the sampler's"
        )
        log.say_once(
            "loss.correction",
            f"old_logprobs are the learner's, as {why}: the gradient does not correct for the "
            "sampler, since loss.correction is none; truncate_token would",
        )
    return True


def _update(
    config: Config,
    parts: Parts,
    rollouts: list[Rollout],
    progress: ReportProgress,
    drift: mismatch.Drift,
) -> Metrics:
    """epochs x minibatches optimizer steps on the rollouts of a step, and their mean metrics."""
    make = pair_minibatches if parts.algorithm.advantages == "pairs" else make_minibatches
    minibatches = make(
        rollouts, config.update.minibatches, config.update.token_budget,
        config.seed + parts.step + 1,
    )  # fmt: skip
    minibatches = [[batch.to(parts.device) for batch in batches] for batches in minibatches]
    results: list[StepResult] = []
    updates = config.update.epochs * len(minibatches)
    for update in range(updates):
        if 0 < update == updates - 1:
            drift.before_last_update()
        parts.whole = False
        batches = minibatches[update % len(minibatches)]
        try:
            results.append(train_step(config, parts, batches, parts.step + 1, update))
        except TrainingError:
            # the critic may have taken its step
            parts.whole = update == 0 and parts.critic is None
            raise
        progress(update + 1, updates)
    return step_metrics(results) | {
        "lr": float(parts.schedule.get_last_lr()[0]),
        **drift.metrics(truncated=config.rollout.truncated),
    }


def train_step(
    config: Config, parts: Parts, batches: Sequence[Batch], step: int, update: int
) -> StepResult:
    """One optimizer step on packed micro-batches: of the critic, where it has a network of its own,
    and of the policy, after the steps in which the critic learns alone.

    Raises:
        TrainingError: a gradient is not finite. That model's weights are those before.
    """
    critic, algorithm, temperature = parts.critic, parts.algorithm, config.rollout.temperature
    values = policy = pairs = pretraining = None
    if critic is not None and not critic.is_shared:
        values = critic.train_step(batches)
        if step <= config.critic.warmup_steps:
            return StepResult(values=values)
    if algorithm.previous_reference:
        batches = [replace(batch, ref_logprobs=batch.old_logprobs) for batch in batches]
    if isinstance(algorithm.objective, Preference):
        pairs = preference_gradients(parts.model, batches, algorithm.objective, temperature)
    elif algorithm.objective is not None:
        policy, shared_values = accumulate_gradients(
            parts.model, batches, algorithm.objective,
            temperature=temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            kl_coef=parts.adaptive.kl_coef if algorithm.kl_adapts_in_loss else None,
            critic=critic if critic is not None and critic.is_shared else None,
        )  # fmt: skip
        values = shared_values if values is None else values
    if algorithm.pretraining_coef:
        count = sum(batch.num_sequences for batch in batches)
        examples = parts.pretraining_batches(config, count, step, update)
        pretraining = supervised_gradients(parts.model, examples, coef=algorithm.pretraining_coef)
    grad_norm, weight_update = apply_gradients(parts.optimizer, config.update.max_grad_norm)
    parts.schedule.step()
    parts.updated(weight_update)
    return StepResult(policy, pairs, values, pretraining, grad_norm, weight_update)


def _publish(config: Config, parts: Parts, log: RunLog, sequences: list[list[int]]) -> Metrics:
    """Make the learner's weights the sampler's and prove that they are."""
    with log.phase("publish"):
        copied = parts.publish()
    with log.phase("resume"):
        parts.sampler.resume_kv()
    with log.phase("verify"):
        try:
            parts.resync.verify()
        except WeightMismatch:
            # what overwrites the sampler's weights overwrites the learner's where they are one
            parts.whole = parts.resync.mode == "copy"
            raise
        if sequences:
            parts.sampler.check_prefixes(max(sequences, key=len))
    metrics: Metrics = {}
    if config.probe.num_sequences:
        with log.phase("probe"), _saved_if_proven(parts):
            probe = probe_weights(
                parts.model, parts.sampler, sequences, config.probe_tolerance,
                parts.tokenizer.decode,
            )  # fmt: skip
            metrics = mismatch.kernels(probe)
            metrics |= mismatch.composition(parts.model, sequences, probe)
    return metrics | {
        "publish/bytes": float(copied),
        "publish/extra_weight_bytes": float(parts.resync.extra_bytes),
        "publish/version": float(parts.sampler.weight_version),
    }


@contextmanager
def _saved_if_proven(parts: Parts) -> Iterator[None]:
    try:
        yield
    except WeightMismatch:
        parts.whole = False
        raise


def _evaluation(config: Config, parts: Parts, log: RunLog, stop: Callable[[], bool]) -> Metrics:
    """How many completions of the held-out prompts are correct, where it is due."""
    every = config.evaluation.every_steps
    if not every or not (parts.step == 0 or due(parts.step, every, config.steps)):
        return {}
    options, samples = greedy(config), config.evaluation.samples
    if samples > 1:
        options = replace(sampling_options(config), group_size=samples)
    with log.phase("evaluate") as progress:
        groups = generate(parts, parts.eval_prompts, options, stop, progress)
        raise_if(stop)
        judged = reward(parts, log, parts.eval_prompts, groups)
    rewards = [[verdict.total for verdict in group] for group in judged]
    flat = [total for group in rewards for total in group]
    metrics = {"eval/accuracy": accuracy(config, flat), "eval/reward": sum(flat) / len(flat)}
    metrics |= source_means(judged, "eval")
    if samples > 1:
        correct = [sum(total >= config.reward.success for total in group) for group in rewards]
        metrics |= {
            f"eval/pass@{k}": pass_at_k(correct, samples, k) for k in powers_of_two(samples)
        }
    return metrics


def _report(metrics_path: Path, log: RunLog) -> None:
    """What was learned, in a line and in a picture."""
    evaluated = [row for row in read_rows(metrics_path) if "eval/accuracy" in row]
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        log.say(
            f"held-out accuracy: {first['eval/accuracy']:.3f} after step {first['step']}, "
            f"{last['eval/accuracy']:.3f} after step {last['step']}"
        )
    log.say(f"learning curves: {plot.plot_run(metrics_path)}")


def _save(config: Config, parts: Parts, log: RunLog, schedule: Schedule) -> None:
    if schedule.saved == parts.step:
        return
    loss, grad_norm = loss_and_gradient(parts.model, parts.probe_sequences).tolist()
    check_state(parts.step, loss, grad_norm, config.output_dir)
    save(parts, log, config, schedule)
