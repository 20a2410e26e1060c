"""A step of the largest shape that a config allows, run and measured for `warpo check`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from warpo.engine.config.policy import Config
from warpo.engine.data.prompts import Prompts
from warpo.engine.errors import WeightMismatch
from warpo.engine.learner.agreement import relative
from warpo.engine.learner.learner import Learner
from warpo.engine.models.batch import Batch
from warpo.engine.plan.memory import MemoryPlan, rollouts_of
from warpo.engine.preflight.peak_memory import PeakMemory, rehearse
from warpo.engine.preflight.report import Line, Report
from warpo.engine.rollout.collect import Rollouts
from warpo.engine.rollout.sampler.base import SamplingOptions
from warpo.engine.run.device import learner_device
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build
from warpo.engine.weights import mismatch
from warpo.engine.weights.probe import probe_weights
from warpo.engine.weights.resync import Resync
from warpo.engine.weights.sync import WeightSync

# Sampling takes no more memory for longer completions: the KV cache is there from the beginning.
MEASURED_NEW_TOKENS = 2


class TriedRun:
    """The objects of a run that are tried; built when `load` is called."""

    rollouts: Rollouts
    learner: Learner
    weights: WeightSync

    def __init__(self, config: Config, plan: MemoryPlan, report: Report, stack: ExitStack) -> None:
        self.config, self.plan, self.report, self._stack = config, plan, report, stack

    def load(self) -> None:
        built = self._stack.enter_context(build(self.config, Run(log=NoLog())))
        self.rollouts, self.learner, self.weights = built
        self.learner.reference.freeze(self.learner.model)
        self.weights.resync.publish(self.learner.fingerprints)

    @property
    def vocab_size(self) -> int:
        return int(self.learner.model.config.get_text_config().vocab_size)

    def update(self, batches: Sequence[Batch]) -> None:
        """One optimizer step, as one after the critic's warm-up."""
        self.learner.train_step(batches, step=self.config.steps, update=0)

    def scored(self) -> list[Batch]:
        """One scored micro-batch of the planned shape, and it again where the step has several."""
        shape, config = self.plan.shape, self.config
        rollouts = rollouts_of(shape, self.vocab_size).to(self.learner.device)
        self.learner.score(rollouts, recompute_old=True)
        assert rollouts.old_logprobs is not None
        rollouts.sampler_logprobs = rollouts.old_logprobs
        batch = rollouts.batch(range(shape.sequences))
        total = config.rollout.prompts_per_step * config.rollout.group_size
        several = total > config.update.minibatches * shape.sequences
        return [batch] * (2 if several else 1)


def measure_step(tried: TriedRun, prompts: Prompts, progress: Callable[[str], None]) -> PeakMemory:
    """A step of the planned shape in the order of training, and the probe at its end."""
    config, plan = tried.config, tried.plan
    device = learner_device(config)
    rehearsed = rehearse(config, device)
    meter = PeakMemory(device)
    with meter.phase("load"):
        tried.load()
    sampler, weights, learner = tried.rollouts.sampler, tried.weights, tried.learner
    # The first update makes the optimizer's state, which all phases of later steps hold.
    progress("update")
    tried.update(tried.scored())
    weights.publish(0)
    progress("sample")
    longest = int(prompts.lengths.max())
    with meter.phase("sample"):
        sampler.generate(_random_prompts(tried, longest), _measured_options(config))
    sampler.release_kv()
    progress("score")
    with meter.phase("score"):
        batches = tried.scored()
    progress("update")
    with meter.phase("update"):
        tried.update(batches)
    progress("publish")
    shape = replace(plan.shape, sequences=1, prompt_tokens=longest)
    (sequence,) = rollouts_of(shape, tried.vocab_size).sequences
    with meter.phase("publish"):
        copied = weights.resync.publish(learner.fingerprints)
        sampler.weights_changed(0)
        sampler.resume_kv()
        weights.resync.verify()
        if config.probe.num_sequences:
            _probe(tried, [sequence.token_ids.tolist()] * config.probe.num_sequences)
    _report_resync(tried.report, weights.resync, copied)
    del rehearsed
    return meter


def _random_prompts(tried: TriedRun, length: int) -> list[list[int]]:
    rng, vocabulary = random.Random(0), tried.vocab_size
    return [
        [rng.randrange(vocabulary) for _ in range(length)]
        for _ in range(tried.config.rollout.prompts_per_step)
    ]


def _measured_options(config: Config) -> SamplingOptions:
    return SamplingOptions(
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        max_new_tokens=min(MEASURED_NEW_TOKENS, config.rollout.max_new_tokens),
        seed=0,
    )


def _report_resync(report: Report, resync: Resync, copied: int) -> None:
    report.head("weights: sampler and learner")
    report.add(
        Line(
            name=f"resync {resync.mode}",
            text=f"{copied} bytes copied after an update, {resync.extra_bytes} bytes of "
            "weights that only the learner has; places and fingerprints agree",
            ok=True,
        )
    )
    if resync.reason:
        report.say(f"        no alias: {resync.reason}")


def _probe(tried: TriedRun, sequences: Sequence[Sequence[int]]) -> None:
    """The proof of every step, after an update that moved the weights."""
    learner, report, bound = tried.learner, tried.report, tried.config.probe_tolerance
    try:
        probed = probe_weights(
            learner.model, tried.rollouts.sampler, sequences, bound, learner.tokenizer.decode
        )
    except WeightMismatch as found:
        text, ok, cure = f"above {bound:g}", False, str(found)
    else:
        error = relative(probed.learner - probed.sampler, probed.learner).max().item()
        text, ok, cure = f"{error:.1e} <= {bound:g}", True, ""
    report.head("largest difference of a logprob after an update, nats; relative beyond 1 nat")
    report.add(Line(name="probe", text=f"{text}, sampler against learner", ok=ok, cure=cure))
    if ok:
        alone = mismatch.composition(learner.model, sequences, probed)["mismatch/composition_max"]
        report.add(
            Line(
                name="composition",
                text=f"{alone:.1e} <= {bound:g}, learner with sequences packed against one only",
                ok=alone <= bound,
                cure="what attention and matrix products add is above probe.tolerance: raise it, "
                "or compute in float32",
            )
        )
