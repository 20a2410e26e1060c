"""The rollouts of a step: prompts drawn, completions sampled and rewarded; and the same greedily
for evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from statistics import pstdev
from typing import NamedTuple

import torch

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.policy import Config
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.data.prompts import Prompts
from warpo.engine.data.stream import PromptStream
from warpo.engine.models.step_rollouts import StepRollouts, spread, step_rollouts
from warpo.engine.rollout.evaluate import (
    Verdict,
    accuracy,
    evaluation_metrics,
    judge,
    source_means,
)
from warpo.engine.rollout.labelled import PairSource
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.rollout.sampler.base import (
    ColocatedSampler,
    Interrupted,
    SamplingOptions,
    check_versions,
)
from warpo.engine.run.loop import Run, due
from warpo.engine.types import Completion, Metrics, Prompt, ReportProgress


class _Draw(NamedTuple):
    """Prompts with the completions of each, and the verdict on each of these."""

    prompts: list[Prompt]
    groups: list[list[Completion]]
    verdicts: list[list[Verdict]]

    def select(self, chosen: list[int]) -> _Draw:
        """The prompts of these numbers."""
        return _Draw(
            [self.prompts[i] for i in chosen],
            [self.groups[i] for i in chosen],
            [self.verdicts[i] for i in chosen],
        )

    def joined(self, other: _Draw) -> _Draw:
        """These and those of another draw."""
        return _Draw(
            self.prompts + other.prompts,
            self.groups + other.groups,
            self.verdicts + other.verdicts,
        )

    @property
    def flat_verdicts(self) -> list[Verdict]:
        return list(chain.from_iterable(self.verdicts))

    @property
    def unequal(self) -> list[int]:
        """Numbers of the groups whose rewards are not all the same."""
        totals = [[verdict.total for verdict in group] for group in self.verdicts]
        return [i for i, rewards in enumerate(totals) if min(rewards) < max(rewards)]


class Rollouts:
    """Source of a run's rollouts.

    Args:
        prompts: to learn from.
        eval_prompts: to be measured on.
        labelled: pairs of a step for a reward model that learns; None without.

    Attributes:
        stream: the order in which prompts are drawn.
        probe_sequences: token ids that learner and sampler are compared on before the first step.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        algorithm: Algorithm,
        *,
        sampler: ColocatedSampler,
        rewards: RewardSources,
        prompts: Prompts,
        eval_prompts: Sequence[Prompt],
        labelled: PairSource | None = None,
    ) -> None:
        self._labelled = labelled
        self.sampler, self.rewards = sampler, rewards
        count = config.rollout.prompts_per_step
        self.stream = PromptStream[Prompt](prompts, prompts.keys, count, config.seed)
        # with a token appended, so that there is one to score after the shortest prompt
        self.probe_sequences = [[*p.token_ids, p.token_ids[0]] for p in prompts[:4]]
        self._config, self._run, self._algorithm = config, run, algorithm
        self._eval_prompts = list(eval_prompts)

    def collect(self, step: int) -> tuple[StepRollouts, Metrics]:
        """A group of rewarded completions of each prompt of a step. The KV cache is released.

        Where the algorithm draws again (DAPO's dynamic sampling, https://arxiv.org/abs/2503.14476
        eq. 11), groups of one reward give way to those of further prompts, until none is left or
        the draws are spent.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        config, max_draws = self._config, self._algorithm.max_draws
        wanted = config.rollout.prompts_per_step
        drawn = kept = self._draw(step, 0)
        draws = 1
        if max_draws > 1:
            while len(drawn.unequal) < wanted and draws < max_draws:
                drawn = drawn.joined(self._draw(step, draws))
                draws += 1
            kept = drawn.select(drawn.unequal[:wanted]) if drawn.unequal else kept
        self._show(kept, step)
        rollouts = self._columns(kept, step)
        with self._run.log.phase("release"):
            self.sampler.release_kv()
        metrics = self._describe(drawn) | source_means(drawn.flat_verdicts, "reward")
        metrics["perf/tokens"] = float(self._run.ranks.sum(rollouts.num_tokens))
        if max_draws > 1:
            metrics |= {
                "rollout/draws": float(draws),
                "rollout/kept_frac": len(kept.prompts) / len(drawn.prompts),
            }
        return rollouts, metrics

    def evaluates_after(self, step: int) -> bool:
        """True if `evaluate` is due after this step."""
        every = self._config.evaluation.every_steps
        return every > 0 and (step == 0 or due(step, every, self._config.steps))

    def evaluate(self, step: int) -> Metrics:
        """Measure the share of correct completions of held-out prompts, if due after this step.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        config, run = self._config, self._run
        if not self.evaluates_after(step):
            return {}
        options, samples = greedy(config), config.evaluation.samples
        if samples > 1:
            options = replace(sampling_options(config), group_size=samples)
        with run.log.phase("evaluate") as progress:
            groups = self._generate(self._eval_prompts, options, progress)
            run.raise_if_stopped()
            judged = judge(self.rewards, run.log, self._eval_prompts, groups)
        return evaluation_metrics(judged, samples, config.reward.success)

    def _show(self, drawn: _Draw, step: int) -> None:
        """Now and then, where somebody looks on, the best and the worst completion of a prompt, one
        of unequal rewards if there is one.
        """
        every, log = self._config.log.completions_every_steps, self._run.log
        if not (log.is_watched and every and due(step, every, self._config.steps)):
            return
        teaching = drawn.unequal or range(len(drawn.prompts))
        number = teaching[step % len(teaching)]
        group, verdicts = drawn.groups[number], drawn.verdicts[number]
        rewards = [verdict.total for verdict in verdicts]
        # one completion where all rewards are equal
        shown = dict.fromkeys(rewards.index(reward) for reward in (max(rewards), min(rewards)))
        prompt, *texts = self.rewards.raw_texts(
            [drawn.prompts[number].token_ids, *(group[i].token_ids.tolist() for i in shown)]
        )
        title = f"step {step}, {len(shown)} of the {len(group)} completions of a prompt:"
        log.show(title, prompt, [(rewards[i], text) for i, text in zip(shown, texts, strict=True)])

    def _columns(self, drawn: _Draw, step: int) -> StepRollouts:
        verdicts = drawn.flat_verdicts
        rollouts = step_rollouts(drawn.prompts, drawn.groups, [v.total for v in verdicts])
        steps = [verdict.steps for verdict in verdicts if verdict.steps is not None]
        if self._algorithm.subtracts.needs_greedy:
            greedy_rewards = torch.tensor(
                self._greedy_rewards(drawn.prompts, step), dtype=torch.float64
            )
            sizes = torch.tensor([len(group) for group in drawn.groups])
            rollouts.baseline_rewards = greedy_rewards.repeat_interleave(sizes)
        if self._algorithm.estimator.needs_sources:
            self._fill_sources(rollouts, verdicts)
        labelled = self._labelled
        if labelled is not None:
            rollouts.labelled = labelled.pairs(*drawn, step)
        return replace(
            rollouts,
            step_rewards=steps or None,
            probed=spread(len(rollouts), self._config.probe.num_sequences),
        )

    def _fill_sources(self, rollouts: StepRollouts, verdicts: list[Verdict]) -> None:
        settings = self._config.reward
        sources = [source for source in parse_sources(settings.sources) if source.weight]
        scores = [[verdict.by_source[source.name] for source in sources] for verdict in verdicts]
        rewards = torch.tensor(scores, dtype=torch.float64)
        if settings.truncated == "zero":
            assert rollouts.finished is not None
            rewards[~rollouts.finished] = 0.0
        rollouts.source_rewards = rewards
        weights = [source.weight for source in sources]
        rollouts.source_weights = torch.tensor(weights, dtype=torch.float64)

    def _draw(self, step: int, number: int) -> _Draw:
        config, run = self._config, self._run
        prompts = self.stream.next()
        # a function of seed, step and draw: a resumed run samples what the whole run would have
        seed = config.seed * 1_000_003 + step + number * 500_009
        groups = self._sample(prompts, sampling_options(config, seed), step, "sample")
        with run.log.phase("reward"):
            verdicts = judge(self.rewards, run.log, prompts, groups)
        run.raise_if_stopped()
        return _Draw(prompts, groups, verdicts)

    def _greedy_rewards(self, prompts: list[Prompt], step: int) -> list[float]:
        """The reward of the most probable completion of each prompt, by one of them each."""
        groups = self._sample(prompts, greedy(self._config), step, "sample greedily")
        with self._run.log.phase("reward"):
            judged = judge(self.rewards, self._run.log, prompts, groups)
        return [verdicts[0].total for verdicts in judged]

    def _sample(
        self, prompts: list[Prompt], options: SamplingOptions, step: int, phase: str
    ) -> list[list[Completion]]:
        with self._run.log.phase(phase) as progress:
            groups = self._generate(prompts, options, progress)
        check_versions(groups, step)
        return groups

    def _generate(
        self, prompts: Sequence[Prompt], options: SamplingOptions, progress: ReportProgress
    ) -> list[list[Completion]]:
        """Completions of each prompt.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        ids = [prompt.token_ids for prompt in prompts]
        try:
            return self.sampler.generate(ids, options, self._run.stop, progress)
        except Interrupted:
            raise KeyboardInterrupt from None

    def _describe(self, drawn: _Draw) -> Metrics:
        """Report on all that was sampled, so that runs that draw again compare with others."""
        gather = self._run.ranks.gather
        rewards = gather([verdict.total for verdict in drawn.flat_verdicts])
        completions = list(chain.from_iterable(drawn.groups))
        lengths = gather([len(completion) for completion in completions])
        finished = gather([completion.finished for completion in completions])
        return {
            "reward/mean": sum(rewards) / len(rewards),
            "reward/std": pstdev(rewards),
            "reward/accuracy": accuracy(rewards, self._config.reward.success),
            "completion/length_mean": sum(lengths) / len(lengths),
            "completion/truncated_frac": 1 - sum(finished) / len(finished),
        }


def sampling_options(config: Config, seed: int = 0) -> SamplingOptions:
    """A group of completions, drawn as in training."""
    return SamplingOptions(
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=seed,
    )


def greedy(config: Config) -> SamplingOptions:
    """One completion of the most probable tokens."""
    return SamplingOptions(
        group_size=1, temperature=0.0, max_new_tokens=config.rollout.max_new_tokens, seed=0
    )
