"""The run: sample, reward, score, update, publish, prove, repeat.

One process holds the sampler and the learner. They take turns, so the KV cache gives its memory
back while the learner works, and the weights that a step ends with are the weights that the next
one samples from.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from warpo.engine import checkpoint, mismatch, plot
from warpo.engine.batch import Batch, Completion, Rollout
from warpo.engine.build import Parts, build, load_reference, make_reference
from warpo.engine.config import Config, resolve_advantage_std
from warpo.engine.data import Prompt
from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.metrics import ReportProgress, RunLog, read_rows
from warpo.engine.optimizer import update_metrics
from warpo.engine.resync import Resync
from warpo.engine.rewards.combine import Rewards
from warpo.engine.sampler.base import Interrupted, SamplingOptions
from warpo.engine.step import (
    EQUAL_LOGPROBS,
    make_minibatches,
    probe_weights,
    train_step,
    warm_start,
    with_scores,
)
from warpo.kernels import ops

Metrics = dict[str, float]


def run(config: Config) -> None:
    """Train as the config says; see `warpo train --help`.

    Raises:
        WarpoError: bad input, or a failed step; a checkpoint of the last complete step is left.
        KeyboardInterrupt: Ctrl-C or SIGTERM; likewise.
    """
    resume_from = checkpoint.latest(config.output_dir) if config.resume else None
    resume_step = int(resume_from.name.removeprefix("step-")) if resume_from else 0
    with RunLog(config.output_dir, config, resume_step=resume_step) as log, _signals(log) as stop:
        with log.phase("load"):
            parts = build(config)
        with parts.rewards, _checkpoint_on_error(config, parts, log):
            _prepare(config, parts, log, resume_from)
            while parts.step < config.steps:
                metrics, sequences = _step(config, parts, log, stop)
                try:
                    metrics |= _publish(config, parts, log, sequences)
                    metrics |= _evaluation(config, parts, log)
                finally:
                    log.write(parts.step, metrics)
                if _due(parts.step, config.checkpoint.every_steps, config.steps):
                    _save(config, parts, log)
        _report(Path(config.output_dir) / "metrics.jsonl", log)


def _prepare(config: Config, parts: Parts, log: RunLog, resume_from: Path | None) -> None:
    """Bring learner, reference and sampler to the state that the first step starts from."""
    millions = sum(p.numel() for p in parts.model.parameters()) / 1e6
    log.say(
        f"{config.model}: {millions:.1f} M parameters, {config.dtype} on {parts.device}, "
        f"sampled by {config.sampler}, {config.loss.objective}"
    )
    log.say(_describe(parts.resync))
    if resume_from:
        parts.step = checkpoint.load(resume_from, model=parts.model, parts=parts.stateful)
        load_reference(config, parts)
        log.say(f"resumed after step {parts.step} from {resume_from}")
    elif config.warm_start.steps:
        with log.phase("warm start") as progress:
            loss = warm_start(
                parts.model, parts.examples, steps=config.warm_start.steps,
                batch_size=config.warm_start.batch_size, lr=config.warm_start.lr,
                token_budget=config.update.token_budget,
                max_grad_norm=config.update.max_grad_norm,
                optimizer_state=config.update.optimizer_state,
                seed=config.seed, progress=progress,
            )  # fmt: skip
        log.say(f"warm start: {config.warm_start.steps} steps, loss {loss:.3f} nats a token")
    parts.boundary = parts.stream.state_dict()
    if not resume_from:
        make_reference(config, parts)
        _save(config, parts, log)
    _publish(config, parts, log, parts.probe_sequences)
    if not resume_from and config.evaluation.every_steps:
        log.start_step()
        log.write(0, _evaluation(config, parts, log))


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
    rollouts, metrics = _rollouts(config, parts, log, stop, step)
    with log.phase("release"):
        parts.sampler.release_kv()
    minibatches = make_minibatches(
        rollouts, config.update.minibatches, config.update.token_budget, config.seed + step
    )
    probed = rollouts[: config.probe.num_sequences]
    with log.phase("score"):
        drift = mismatch.Drift(parts.model, probed, config.rollout.temperature)
        minibatches, saving = _score(config, parts, minibatches, drift.sampling_difference)
    _raise_if(stop)
    with log.phase("update") as progress:
        metrics |= saving | _update(config, parts, minibatches, progress, drift)
    parts.step, parts.whole, parts.boundary = step, True, parts.stream.state_dict()
    return metrics, [r.prompt_ids + r.completion.token_ids for r in probed]


def _score(
    config: Config, parts: Parts, minibatches: list[list[Batch]], sampling_difference: float
) -> tuple[list[list[Batch]], Metrics]:
    """The minibatches on the device with their scores, and what not scoring saved.

    old_logprobs/tokens_saved: tokens that the learner's extra forward pass would have read, in a
    step that did without. Its seconds are the growth of perf/score_s in the same run with
    probe.num_sequences = 0, where nothing shows that the sampler's logprobs serve.
    """
    # A truncated distribution is not the learner's, so its logprobs are no old_logprobs.
    recompute_old = config.rollout.truncated or sampling_difference > EQUAL_LOGPROBS
    scored = [
        [
            with_scores(
                batch.to(parts.device), parts.model, parts.reference,
                temperature=config.rollout.temperature, recompute_old=recompute_old,
            )
            for batch in batches
        ]
        for batches in minibatches
    ]  # fmt: skip
    tokens = sum(batch.input_ids.numel() for batches in minibatches for batch in batches)
    return scored, {
        "old_logprobs/recomputed": float(recompute_old),
        "old_logprobs/tokens_saved": 0.0 if recompute_old else float(tokens),
    }


def _rollouts(
    config: Config, parts: Parts, log: RunLog, stop: Callable[[], bool], step: int
) -> tuple[list[Rollout], Metrics]:
    """Sample a group of completions of each prompt, reward them, compare each with its group."""
    prompts = parts.stream.next()
    group_size = config.rollout.group_size
    options = SamplingOptions(
        group_size=group_size,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        # a function of seed and step: a resumed run samples what the whole run would have
        seed=config.seed * 1_000_003 + step,
    )
    with log.phase("sample") as progress:
        groups = _generate(parts, prompts, options, stop, progress)
    _check_versions(parts, groups)
    with log.phase("reward"):
        scored = _rewards(parts, log, prompts, groups)
    _raise_if(stop)
    rewards = scored.totals
    advantages = ops.group_advantages(
        torch.tensor(rewards), group_size, std=resolve_advantage_std(config.loss)
    )
    completions = [completion for group in groups for completion in group]
    rollouts = [
        Rollout(
            prompt_ids=prompts[i // group_size].token_ids,
            completion=completion,
            reward=rewards[i],
            advantage=advantage,
        )
        for i, (completion, advantage) in enumerate(
            zip(completions, advantages.advantages.tolist(), strict=True)
        )
    ]
    lengths = [len(completion.token_ids) for completion in completions]
    count = len(completions)
    return rollouts, {
        "reward/mean": sum(rewards) / count,
        **scored.metrics(),
        "reward/accuracy": _accuracy(config, rewards),
        "reward/degenerate_frac": advantages.num_degenerate.item() / len(prompts),
        "completion/length_mean": sum(lengths) / count,
        "completion/finished_frac": sum(c.finished for c in completions) / count,
        "perf/tokens": float(sum(rollout.num_tokens for rollout in rollouts)),
    }


def _generate(
    parts: Parts,
    prompts: list[Prompt],
    options: SamplingOptions,
    stop: Callable[[], bool],
    progress: ReportProgress,
) -> list[list[Completion]]:
    try:
        ids = [prompt.token_ids for prompt in prompts]
        return parts.sampler.generate(ids, options, stop, progress)
    except Interrupted:
        raise KeyboardInterrupt from None


def _check_versions(parts: Parts, groups: list[list[Completion]]) -> None:
    versions = {completion.weight_version for group in groups for completion in group}
    if versions != {parts.step}:
        raise WeightMismatch(
            f"step {parts.step + 1} sampled with versions {sorted(versions)} of the weights, and "
            f"the learner has version {parts.step}"
        )


def _rewards(
    parts: Parts, log: RunLog, prompts: list[Prompt], groups: list[list[Completion]]
) -> Rewards:
    owners = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    rewards = parts.rewards(owners, [completion for group in groups for completion in group])
    for note in rewards.notes:
        log.say(note)
    return rewards


def _accuracy(config: Config, rewards: list[float]) -> float:
    return sum(reward >= config.reward.success for reward in rewards) / len(rewards)


def _update(
    config: Config,
    parts: Parts,
    minibatches: list[list[Batch]],
    progress: ReportProgress,
    drift: mismatch.Drift,
) -> Metrics:
    """epochs x minibatches optimizer steps on the rollouts of a step, and their mean metrics."""
    results = []
    updates = config.update.epochs * len(minibatches)
    for update in range(updates):
        if 0 < update == updates - 1:
            drift.before_last_update()
        parts.whole = False
        try:
            result = train_step(
                parts.model, parts.optimizer, minibatches[update % len(minibatches)],
                parts.objective, temperature=config.rollout.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                max_grad_norm=config.update.max_grad_norm,
            )  # fmt: skip
        except TrainingError:
            parts.whole = update == 0
            raise
        parts.schedule.step()
        results.append(result)
        parts.fingerprints = result.update.fingerprints
        progress(update + 1, updates)
    metrics = ops.policy_metrics(ops.sum_metrics([result.metrics for result in results]))
    metrics |= update_metrics([result.update for result in results])
    return metrics | {
        "loss/policy": metrics["loss/policy"] / updates,
        "loss/kl": metrics["loss/kl"] / updates,
        "loss/entropy": metrics["loss/entropy"] / updates,
        "kl/mean": metrics["kl/ref" if parts.reference is not None else "kl/approx"],
        "ratio/clip_frac": metrics["ratio/clip_frac_low"] + metrics["ratio/clip_frac_high"],
        "grad_norm": sum(result.grad_norm.item() for result in results) / updates,
        "lr": float(parts.schedule.get_last_lr()[0]),
        **drift.metrics(truncated=config.rollout.truncated),
    }


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
        with log.phase("probe"):
            probe = probe_weights(parts.model, parts.sampler, sequences, config.probe.tolerance)
            metrics = mismatch.kernels(probe)
            metrics |= mismatch.composition(parts.model, sequences, probe)
    return metrics | {
        "publish/bytes": float(copied),
        "publish/extra_weight_bytes": float(parts.resync.extra_bytes),
        "publish/version": float(parts.sampler.weight_version),
    }


def _evaluation(config: Config, parts: Parts, log: RunLog) -> Metrics:
    """Accuracy of greedy completions of the held-out prompts, where it is due."""
    every = config.evaluation.every_steps
    if not every or not (parts.step == 0 or _due(parts.step, every, config.steps)):
        return {}
    options = SamplingOptions(
        group_size=1, temperature=0.0, max_new_tokens=config.rollout.max_new_tokens, seed=0
    )
    with log.phase("evaluate") as progress:
        groups = _generate(parts, parts.eval_prompts, options, lambda: False, progress)
        rewards = _rewards(parts, log, parts.eval_prompts, groups).totals
    return {"eval/accuracy": _accuracy(config, rewards), "eval/reward": sum(rewards) / len(rewards)}


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


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _save(config: Config, parts: Parts, log: RunLog) -> None:
    with log.phase("checkpoint"):
        checkpoint.save(
            config.output_dir,
            step=parts.step,
            model=parts.model,
            tokenizer=parts.tokenizer,
            parts=parts.stateful,
            keep=config.checkpoint.keep,
        )


@contextmanager
def _checkpoint_on_error(config: Config, parts: Parts, log: RunLog) -> Iterator[None]:
    """Leave a checkpoint of the last complete step, whatever ends the run."""
    try:
        yield
    except BaseException:
        if parts.whole and parts.boundary:
            parts.stream.load_state_dict(parts.boundary)
            _save(config, parts, log)
            log.say(f"stopped; step {parts.step} is saved: --resume continues after it")
        elif parts.boundary:
            log.say("stopped within an update; --resume continues from the newest checkpoint")
        raise


@contextmanager
def _signals(log: RunLog) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for a moment at which nothing is lost; a second one does not wait."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.say("stopping as soon as nothing is lost; again to stop at once")

    previous = {}
    with suppress(ValueError):  # not in the main thread: signals are the caller's
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_if(stop: Callable[[], bool]) -> None:
    if stop():
        raise KeyboardInterrupt
