"""Evaluation of sampled completions: the verdict on each, and means over many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from warpo.engine.rollout.pass_at_k import pass_at_k, powers_of_two
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.run.log import Log
from warpo.engine.types import Completion, Metrics, Prompt, TokenSteps


class Verdict(NamedTuple):
    """The reward of a completion, those of its steps where a source scores steps, and what each
    source gave it."""

    total: float
    steps: TokenSteps | None
    by_source: dict[str, float]


def judge(
    rewards: RewardSources,
    log: Log,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
) -> list[list[Verdict]]:
    """The verdict on each completion of each prompt; log and count what could not be scored."""
    owners = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    found = rewards(owners, [completion for group in groups for completion in group])
    for note in found.notes:
        log.say(note)
    log.count("reward/failed", found.failed)
    log.count("reward/retries", found.retries)
    verdicts = (
        Verdict(
            total,
            found.steps[i] if found.steps is not None else None,
            {name: scores[i] for name, scores in found.by_source.items()},
        )
        for i, total in enumerate(found.totals)
    )
    return [[next(verdicts) for _ in group] for group in groups]


def accuracy(rewards: Sequence[float], success: float) -> float:
    """Share of rewards that count as success."""
    return sum(reward >= success for reward in rewards) / len(rewards)


def source_means(verdicts: Sequence[Verdict], prefix: str) -> Metrics:
    """The mean of each source, without its weight, where there are several."""
    given = [verdict.by_source for verdict in verdicts]
    if len(given[0]) == 1:
        return {}
    return {f"{prefix}/{name}": sum(row[name] for row in given) / len(given) for name in given[0]}


def evaluation_metrics(
    verdicts: Sequence[Sequence[Verdict]], samples: int, success: float
) -> Metrics:
    """eval/accuracy, eval/reward and, of several samples of each prompt, eval/pass@k."""
    rewards = [[verdict.total for verdict in group] for group in verdicts]
    flat = [total for group in rewards for total in group]
    metrics = {"eval/accuracy": accuracy(flat, success), "eval/reward": sum(flat) / len(flat)}
    metrics |= source_means([verdict for group in verdicts for verdict in group], "eval")
    if samples > 1:
        correct = [sum(total >= success for total in group) for group in rewards]
        metrics |= {
            f"eval/pass@{k}": pass_at_k(correct, samples, k) for k in powers_of_two(samples)
        }
    return metrics
