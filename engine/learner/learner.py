"""The policy with its optimizer, critic and reference, and what a step does to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine.config.policy import Config
from warpo.engine.config.resolve import resolve
from warpo.engine.data.examples import Examples
from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.learner.adapters import Adapters
from warpo.engine.learner.advantages import AdaptiveState, estimate
from warpo.engine.learner.covariance import by_covariance
from warpo.engine.learner.critic import Critic
from warpo.engine.learner.drift import Drift, step_kl
from warpo.engine.learner.losses import preference_gradients
from warpo.engine.learner.minibatches import make_minibatches
from warpo.engine.learner.old_logprobs import (
    are_the_updates,
    sampler_serves,
    say_what_is_uncorrected,
)
from warpo.engine.learner.optimizer import WeightUpdate
from warpo.engine.learner.pairs import pair_minibatches
from warpo.engine.learner.pretraining import Pretraining
from warpo.engine.learner.reference import Reference
from warpo.engine.learner.reward_model import RewardModelLearner
from warpo.engine.learner.schedule import make_optimizer
from warpo.engine.learner.step import StepResult, accumulate_gradients
from warpo.engine.learner.step_metrics import step_metrics
from warpo.engine.models.batch import Batch
from warpo.engine.models.layers import prepare_layers
from warpo.engine.models.micro_batches import split_rows, tokens_read
from warpo.engine.models.model import is_packed
from warpo.engine.models.score import device_of, loss_and_gradient, score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.run.checkpoint import Stateful
from warpo.engine.run.loop import Progress, Run, check_state
from warpo.engine.types import Metrics, ReportProgress
from warpo.kernels.preferences import Preference


class Learner:
    """The models that learn, and `update`, which lets them learn from the rollouts of a step.

    Args:
        model: the policy, whose parameters lie where they stay.
        examples: examples of pretraining.data; None without.
        reward_model: the reward model that learns too; None without.
        adapters: of the model, which learn instead of its weights; None without.

    Attributes:
        progress: steps that are complete, and whether the weights are those of a step.
        fingerprints: of the policy's weights by name, as the last optimizer step wrote them; None
            before it.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples | None = None,
        reward_model: RewardModelLearner | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.algorithm = algorithm = resolve(config)
        self._config, self._run = config, run
        prepare_layers(model, config.update)
        self.critic = Critic(config, model, run.ranks) if algorithm.has_critic else None
        learned = [*(adapters or model).named_parameters()]
        learned += [] if self.critic is None else self.critic.named_parameters()
        updates = (config.steps - config.critic.warmup_steps) * config.update.per_step
        self.optimizer, self.schedule = make_optimizer(
            learned, config.update, updates, ranks=run.ranks
        )
        learns_entropy = algorithm.reward_entropy_target is not None
        self.adaptive = AdaptiveState(
            algorithm.kl_coef,
            adapts=algorithm.kl_target is not None,
            entropy_coef=algorithm.reward_entropy_coef if learns_entropy else None,
        )
        self.reference = Reference(config, algorithm, adapters)
        self.pretraining = None if examples is None else Pretraining(config, examples, run.ranks)
        self.reward_model = reward_model
        self.progress = Progress()
        self.progress.track(adaptive=self.adaptive)
        self.fingerprints: dict[str, Tensor] | None = None

    @property
    def step(self) -> int:
        """Steps whose update is complete."""
        return self.progress.step

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def stepped(self) -> list[Tensor]:
        """Parameters of all models that learn."""
        policy = [p for group in self.optimizer.param_groups for p in group["params"]]
        others = [part.stepped for part in (self.critic, self.reward_model) if part is not None]
        return policy + [p for part in others for p in part]

    @property
    def stateful(self) -> dict[str, Stateful]:
        """State that a checkpoint keeps next to the weights of the policy."""
        parts: dict[str, Stateful] = {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "adaptive": self.adaptive,
        }
        if self.pretraining is not None:
            parts["pretraining"] = self.pretraining.record
        if self.reward_model is not None:
            parts["reward_model"] = self.reward_model
        if self.adapters is not None:
            parts["adapters"] = self.adapters.record
        return parts if self.critic is None else parts | {"critic": self.critic}

    @property
    def pretraining_changes(self) -> str:
        """Describe how pretraining.data differ from those of the checkpoint that was loaded."""
        return self.pretraining.record.changes if self.pretraining else ""

    def update(self, rollouts: StepRollouts) -> Metrics:
        """Score the rollouts, estimate their advantages, and take epochs x minibatches optimizer
        steps on them, fewer where update.max_kl ends the epochs; the step is complete then.

        Raises:
            TrainingError: a gradient is not finite, or a logprob.
            WeightMismatch: the rollouts were not drawn with the weights that the step begins with;
                these count as lost.
            KeyboardInterrupt: a stop was asked for before the first optimizer step.
        """
        config, log = self._config, self._run.log
        rollouts = rollouts.to(self.device)
        with log.phase("score"):
            by_update = are_the_updates(config, self.algorithm, self.step)
            drift = Drift(self.model, rollouts, config.rollout.temperature, scored=not by_update)
            if drift.scored:
                self._check_sampler(drift)
            serves = by_update or sampler_serves(config, self.algorithm, rollouts, drift)
            metrics = self.score(rollouts, recompute_old=not serves)
        with log.phase("advantages"):
            estimated = estimate(self.algorithm, rollouts, self.adaptive)
            if self.algorithm.right_nll_coef:
                rollouts.mark_right(config.reward.success)
        self._run.raise_if_stopped()
        with log.phase("update") as report:
            metrics |= self._epochs(rollouts, drift, report)
            say_what_is_uncorrected(config, self.algorithm, drift, log)
            metrics["lr"] = float(self.schedule.get_last_lr()[0])
            metrics |= drift.metrics(truncated=config.rollout.truncated) | estimated
        metrics |= self._adapt(metrics)
        if self.reward_model is not None:
            with log.phase("reward model"):
                metrics |= self.reward_model.update(self.step + 1, rollouts.labelled)
        self.reference.renew(self.model, self.step + 1)
        self.progress.complete()
        return metrics

    def _check_sampler(self, drift: Drift) -> None:
        """Prove by what was drawn that the sampler holds the weights that the step begins with."""
        if self._config.rollout.truncated:
            return
        try:
            drift.check(
                self._config.probe_tolerance, version=self.step, decode=self.tokenizer.decode
            )
        except WeightMismatch:
            self.progress.whole = False
            raise

    def _take_step(
        self, batches: Sequence[Batch], rollouts: StepRollouts, drift: Drift, update: int
    ) -> StepResult:
        """An optimizer step; where it is the one that scores the rollouts, the proof by it too."""
        if drift.scored:
            return self.train_step(batches, self.step + 1, update)

        def prove(logprobs: Tensor) -> None:
            tokens = [batch.token_index for batch in batches if batch.token_index is not None]
            rollouts.fill_tokens("old_logprobs", torch.cat(tokens), logprobs)
            assert rollouts.old_logprobs is not None
            drift.scored_by(rollouts.old_logprobs)
            self._check_sampler(drift)

        batches = [replace(batch, old_logprobs=None) for batch in batches]
        return self.train_step(batches, self.step + 1, update, prove)

    def _epochs(self, rollouts: StepRollouts, drift: Drift, report: ReportProgress) -> Metrics:
        """Passes over the rollouts, until update.max_kl ends them."""
        config, results, kl, epoch = self._config.update, list[StepResult](), None, 0
        read = total = 0
        limit = math.inf if config.max_kl == "none" else config.max_kl
        for epoch in range(1, config.epochs + 1):
            minibatches, is_last = self._minibatches(rollouts, epoch), epoch == config.epochs
            updates = config.epochs * len(minibatches)
            read += sum(batch.num_tokens for part in minibatches for batch in part)
            total += sum(batch.sequence_tokens for part in minibatches for batch in part)
            for i, batches in enumerate(minibatches, start=1):
                may_end = i == len(minibatches) and (is_last or limit < math.inf)
                if may_end and results:
                    drift.before_last_update()
                results.append(self._take_step(batches, rollouts, drift, len(results)))
                report(len(results), updates)
            if limit < math.inf or (is_last and self.algorithm.kl_adapts_to_step):
                kl = step_kl(self.model, rollouts, self._config, self._run.ranks)
                if kl > limit:
                    break
        self._skip(config.per_step - len(results))
        metrics = step_metrics(results, self._run.ranks)
        total = max(1, self._run.ranks.sum(total))
        share = 1 - self._run.ranks.sum(read) / total
        metrics["pack/shared_frac"] = share if is_packed(self.model) else 0.0
        if limit < math.inf:
            metrics["update/epochs"] = float(epoch)
        return metrics if kl is None else metrics | {"kl/step": kl}

    def _skip(self, updates: int) -> None:
        """Let the learning rates go on over optimizer steps of this step that are not taken."""
        if self.step >= self._config.critic.warmup_steps:
            self.schedule.skip(updates)
        if self.critic is not None:
            self.critic.skip(updates)

    def score(self, rollouts: StepRollouts, recompute_old: bool) -> Metrics:
        """Fill the columns of logprobs and values that the algorithm reads; returns what not
        scoring saved.

        old_logprobs/tokens_saved: tokens that the learner's extra forward pass would have read, in
        a step that did without. Its seconds are the growth of perf/score_s in the same run with
        probe.num_sequences = 0, where nothing shows that the sampler's logprobs serve.
        """
        temperature = self._config.rollout.temperature
        sequences, shared = rollouts.sequences, is_packed(self.model)
        micro_batches = split_rows(sequences, self._config.update.token_budget, shared=shared)
        if recompute_old or self.reference or self.critic is not None:
            for rows in micro_batches:
                batch = rollouts.batch(rows)
                if self.reference:
                    rollouts.fill("ref_logprobs", rows, self.reference.logprobs(batch))
                if recompute_old:
                    found = score(self.model, batch, temperature)
                    rollouts.fill("old_logprobs", rows, found)
                if self.critic is not None:
                    values, last_values = self.critic.values(batch)
                    rollouts.fill("values", rows, values)
                    if last_values is not None:
                        rollouts.fill_last_values(rows, last_values)
        saved = 0 if recompute_old else tokens_read(sequences, micro_batches, shared=shared)
        return {
            "old_logprobs/recomputed": float(recompute_old),
            "old_logprobs/tokens_saved": float(saved),
        }

    def train_step(
        self,
        batches: Sequence[Batch],
        step: int,
        update: int,
        prove: Callable[[Tensor], None] = lambda logprobs: None,
    ) -> StepResult:
        """One optimizer step on packed micro-batches: of the critic, where it has a network of its
        own, and of the policy, after the steps in which only the critic learns.

        Args:
            prove: is given the policy's logprobs of the micro-batches before its weights move.

        Raises:
            TrainingError: a gradient is not finite. That model's weights are those before.
        """
        config, critic = self._config, self.critic
        # the critic may have taken its step when the policy's fails
        with self._between_steps(untouched=update == 0 and critic is None):
            result = StepResult()
            if critic is not None and not critic.is_shared:
                result = StepResult(values=critic.train_step(batches))
                if step <= config.critic.warmup_steps:
                    return result
            result = self._accumulate(batches, step, update, result)
            if result.logprobs is not None:
                prove(result.logprobs)
            weight_update = self.optimizer.step(config.update.max_grad_norm)
        self.schedule.step()
        return result._replace(update=self._published(weight_update))

    @contextmanager
    def _between_steps(self, *, untouched: bool) -> Iterator[None]:
        self.progress.whole = False
        try:
            yield
        except TrainingError:
            self.progress.whole = untouched
            raise

    def _accumulate(
        self, batches: Sequence[Batch], step: int, update: int, result: StepResult
    ) -> StepResult:
        """Add the gradients of the policy's losses."""
        algorithm, config, ranks = self.algorithm, self._config, self._run.ranks
        if algorithm.previous_reference:
            batches = [replace(batch, ref_logprobs=batch.old_logprobs) for batch in batches]
        if isinstance(algorithm.objective, Preference):
            pairs = preference_gradients(
                self.model,
                batches,
                algorithm.objective,
                config.rollout.temperature,
                ranks=ranks,
            )
            result = result._replace(pairs=pairs)
        elif algorithm.objective is not None:
            shared = self.critic if self.critic is not None and self.critic.is_shared else None
            if algorithm.covariance != "none":
                batches, covariance = by_covariance(
                    algorithm,
                    self.model,
                    batches,
                    temperature=config.rollout.temperature,
                    seed=(config.seed, step, update),
                    ranks=ranks,
                )
                result = result._replace(covariance=covariance)
            found = accumulate_gradients(
                self.model,
                batches,
                algorithm.objective,
                temperature=config.rollout.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                kl_coef=self.adaptive.kl_coef if algorithm.kl_adapts_in_loss else None,
                causal_gamma=algorithm.gamma if algorithm.estimator.is_causal else None,
                critic=shared,
                right_nll_coef=algorithm.right_nll_coef,
                penalty_coef=algorithm.covariance_kl_coef,
                ranks=ranks,
            )
            parts = {name: part for name, part in found._asdict().items() if part is not None}
            result = result._replace(**parts)
        if algorithm.pretraining_coef and self.pretraining is not None:
            coef = algorithm.pretraining_coef
            loss = self.pretraining.gradients(self.model, batches, step, update, coef)
            result = result._replace(pretraining=loss)
        return result

    def _published(self, update: WeightUpdate) -> WeightUpdate:
        """The effect of an optimizer step on the policy's weights, kept for the next publish."""
        if self.adapters is not None:
            update = self.adapters.after(update)
        others = {name for name, _ in self.critic.named_parameters()} if self.critic else set()
        self.fingerprints = {n: x for n, x in update.fingerprints.items() if n not in others}
        return update

    def _minibatches(self, rollouts: StepRollouts, epoch: int) -> list[list[Batch]]:
        """Those of an epoch, dealt by seed, step and epoch only."""
        make = partial(make_minibatches, shared=is_packed(self.model))
        if self.algorithm.estimator.makes_pairs:
            make = partial(pair_minibatches, choice=self.algorithm.pairs, **make.keywords)
        update = self._config.update
        seed = self._config.seed + self.step + 1 + (epoch - 1) * 1_000_003
        return [
            [rollouts.batch(rows) for rows in minibatch]
            for minibatch in make(rollouts, update.minibatches, update.token_budget, seed)
        ]

    def _adapt(self, metrics: Metrics) -> Metrics:
        """Move kl_coef after a step; returns its value before, and the KL that it weighs."""
        if "kl/approx" not in metrics:
            return {}
        name = "kl/ref" if self.algorithm.kl_coef else "kl/approx"
        if self.algorithm.kl_adapts_to_step:
            # the optimizer steps see it before they are taken: the first of them sees 0
            name = "kl/step"
        found = {"kl/mean": metrics[name], "kl/coef": self.adaptive.kl_coef}
        self.adaptive.adapt(self.algorithm, found["kl/mean"])
        return found

    def check_state(self, sequences: Sequence[Sequence[int]]) -> None:
        """Prove that training can go on from the weights: loss and gradient on texts are finite.

        Raises:
            TrainingError: they are not.
            WeightMismatch: something has written to the base of the adapters.
        """
        if self.adapters is not None:
            self.adapters.check_base()
        loss, grad_norm = loss_and_gradient(self.model, sequences).tolist()
        check_state(self.step, loss, grad_norm, self._config.output_dir)
