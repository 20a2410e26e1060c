"""The rollouts of a step: prompts drawn, completions sampled and rewarded; and the same greedily
for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from warpo.engine.batch import Completion, Rollout
from warpo.engine.build import Parts
from warpo.engine.config import Config
from warpo.engine.data import Prompt
from warpo.engine.loop import raise_if
from warpo.engine.metrics import ReportProgress, RunLog
from warpo.engine.rewards.scores import Steps
from warpo.engine.sampler.base import Interrupted, SamplingOptions, check_versions

Stop = Callable[[], bool]
Metrics = dict[str, float]


class Verdict(NamedTuple):
    """The reward of a completion, those of its steps where a source scores steps, and what each
    source gave it."""

    total: float
    steps: Steps | None
    by_source: dict[str, float]


class _Draw(NamedTuple):
    """Prompts with the completions of each, and the verdict on each of these."""

    prompts: list[Prompt]
    groups: list[list[Completion]]
    verdicts: list[list[Verdict]]

    def select(self, chosen: list[int]) -> _Draw:
        return _Draw(*([part[i] for i in chosen] for part in self))  # type: ignore[arg-type]

    def __add__(self, other: _Draw) -> _Draw:  # type: ignore[override]
        return _Draw(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))  # type: ignore[arg-type, operator]


def collect(
    config: Config, parts: Parts, log: RunLog, stop: Stop, step: int
) -> tuple[list[Rollout], Metrics]:
    """A group of rewarded completions of each prompt of a step.

    Where the algorithm draws again (DAPO's dynamic sampling, https://arxiv.org/abs/2503.14476
    eq. 11), groups of one reward give way to those of further prompts, until none is left or the
    draws are spent.
    """
    wanted, max_draws = config.rollout.prompts_per_step, parts.algorithm.max_draws
    drawn = kept = _draw(config, parts, log, stop, step, 0)
    draws = 1
    if max_draws > 1:
        while len(_unequal(drawn)) < wanted and draws < max_draws:
            drawn = drawn + _draw(config, parts, log, stop, step, draws)
            draws += 1
        kept = drawn.select(_unequal(drawn)[:wanted]) if _unequal(drawn) else kept
    baselines = [0.0] * len(kept.prompts)
    if parts.algorithm.advantages == "greedy":
        baselines = _greedy_rewards(config, parts, log, stop, kept.prompts)
    rollouts = [
        Rollout(
            prompt_ids=prompt.token_ids,
            completion=completion,
            reward=verdict.total,
            step_rewards=verdict.steps,
            baseline_reward=baseline,
        )
        for prompt, group, verdicts, baseline in zip(*kept, baselines, strict=True)
        for completion, verdict in zip(group, verdicts, strict=True)
    ]
    metrics = _describe(config, drawn) | source_means(drawn.verdicts, "reward")
    metrics["perf/tokens"] = float(sum(rollout.num_tokens for rollout in rollouts))
    if max_draws > 1:
        metrics |= {
            "rollout/draws": float(draws),
            "rollout/kept_frac": len(kept.prompts) / len(drawn.prompts),
        }
    return rollouts, metrics


def _describe(config: Config, drawn: _Draw) -> Metrics:
    """Of all that was sampled, so that runs that draw again compare with others."""
    rewards = [verdict.total for verdicts in drawn.verdicts for verdict in verdicts]
    completions = [completion for group in drawn.groups for completion in group]
    count = len(completions)
    return {
        "reward/mean": sum(rewards) / count,
        "reward/accuracy": accuracy(config, rewards),
        "completion/length_mean": sum(len(c.token_ids) for c in completions) / count,
        "completion/finished_frac": sum(c.finished for c in completions) / count,
    }


def source_means(verdicts: list[list[Verdict]], prefix: str) -> Metrics:
    """The mean of each source, without its weight, where there are several."""
    given = [verdict.by_source for group in verdicts for verdict in group]
    if len(given[0]) == 1:
        return {}
    return {f"{prefix}/{name}": sum(row[name] for row in given) / len(given) for name in given[0]}


def _unequal(drawn: _Draw) -> list[int]:
    """Places of the groups whose rewards are not all the same."""
    totals = [[verdict.total for verdict in group] for group in drawn.verdicts]
    return [i for i, rewards in enumerate(totals) if min(rewards) < max(rewards)]


def _draw(config: Config, parts: Parts, log: RunLog, stop: Stop, step: int, number: int) -> _Draw:
    prompts = parts.stream.next()
    # a function of seed, step and draw: a resumed run samples what the whole run would have
    options = sampling_options(config, seed=config.seed * 1_000_003 + step + number * 500_009)
    groups = _sample(parts, log, prompts, options, stop, "sample")
    with log.phase("reward"):
        verdicts = reward(parts, log, prompts, groups)
    raise_if(stop)
    return _Draw(prompts, groups, verdicts)


def _greedy_rewards(
    config: Config, parts: Parts, log: RunLog, stop: Stop, prompts: list[Prompt]
) -> list[float]:
    """The reward of the most probable completion of each prompt, by one of them each."""
    groups = _sample(parts, log, prompts, greedy(config), stop, "sample greedily")
    with log.phase("reward"):
        return [verdicts[0].total for verdicts in reward(parts, log, prompts, groups)]


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


def _sample(
    parts: Parts,
    log: RunLog,
    prompts: list[Prompt],
    options: SamplingOptions,
    stop: Stop,
    phase: str,
) -> list[list[Completion]]:
    with log.phase(phase) as progress:
        groups = generate(parts, prompts, options, stop, progress)
    check_versions(groups, parts.step + 1)
    return groups


def generate(
    parts: Parts,
    prompts: list[Prompt],
    options: SamplingOptions,
    stop: Stop,
    progress: ReportProgress,
) -> list[list[Completion]]:
    """Completions of each prompt.

    Raises:
        KeyboardInterrupt: stop() became true.
    """
    try:
        ids = [prompt.token_ids for prompt in prompts]
        return parts.sampler.generate(ids, options, stop, progress)
    except Interrupted:
        raise KeyboardInterrupt from None


def reward(
    parts: Parts, log: RunLog, prompts: list[Prompt], groups: list[list[Completion]]
) -> list[list[Verdict]]:
    """The verdict on each completion of each prompt; log and count what failed."""
    owners = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    rewards = parts.rewards(owners, [completion for group in groups for completion in group])
    for note in rewards.notes:
        log.say(note)
    log.count("reward/failed", rewards.failed)
    log.count("reward/retries", rewards.retries)
    verdicts = (
        Verdict(
            total,
            rewards.steps[i] if rewards.steps is not None else None,
            {name: scores[i] for name, scores in rewards.by_source.items()},
        )
        for i, total in enumerate(rewards.totals)
    )
    return [[next(verdicts) for _ in group] for group in groups]


def accuracy(config: Config, rewards: list[float]) -> float:
    """Share of rewards that count as success."""
    return sum(reward >= config.reward.success for reward in rewards) / len(rewards)
