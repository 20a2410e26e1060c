"""The reward of a completion: the weighted sum of what the sources say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from warpo.engine.config.reward_sources import Source, parse_sources
from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.base import RewardSource, SourceContext, open_source
from warpo.engine.types import Completion, Prompt, TokenSteps


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Scores that the sources give to B completions.

    Attributes:
        totals: B weighted sums over sources and steps; with reward.truncated = "zero" 0 for a
            completion that was cut, whose steps have none either.
        steps: (index of the step's last token in the completion, weighted score) of each step of
            each completion; None if no source scores steps. What other sources say of a whole
            completion counts to its last step.
        by_source: B scores of each source, without its weight.
        failed: completions that a source could not score, each counted for each such source.
        retries: calls that were made again.
        notes: descriptions of what went wrong.
    """

    totals: list[float]
    steps: list[TokenSteps] | None
    by_source: dict[str, list[float]]
    failed: int
    retries: int
    notes: list[str]


class RewardSources:
    """All sources of `reward.sources`, ready to score. A context manager that ends their processes.

    Raises:
        ConfigError, RewardError: a source cannot be used.
    """

    def __init__(self, context: SourceContext) -> None:
        self._tokenizer = context.tokenizer
        self._needs_end = context.settings.truncated == "zero"
        self._opened: list[tuple[Source, RewardSource]] = []
        try:
            for source in parse_sources(context.settings.sources):
                opened = open_source(source, context)
                self._opened.append((source, opened))
        except BaseException:
            self.close()
            raise

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Rewards:
        """The rewards of completions, each of the prompt in the same place.

        Raises:
            RewardError: a source failed, or two of them score steps.
        """
        texts = self.texts(completions)
        totals, by_source = [0.0] * len(texts), {}
        failed, retries, notes = 0, 0, []
        steps: list[TokenSteps] | None = None
        for source, opened in self._opened:
            scored = opened.score(prompts, completions, texts)
            failed, retries = failed + len(scored.failed), retries + scored.retries
            notes += scored.notes
            scores: list[Any] = scored.scores
            if isinstance(scores[0], list):
                if steps is not None:
                    raise RewardError(
                        f"reward.sources: {source.name} scores steps and so does another source: "
                        "let one of them return a number for each completion"
                    )
                steps = [[(end, source.weight * score) for end, score in row] for row in scores]
                scores = [sum(score for _, score in row) for row in scores]
            by_source[source.name] = scores
            totals = [t + source.weight * score for t, score in zip(totals, scores, strict=True)]
        _check_finite(totals)
        if self._needs_end:
            ended = [completion.finished for completion in completions]
            totals = [total if end else 0.0 for total, end in zip(totals, ended, strict=True)]
            steps = steps and [row if end else [] for row, end in zip(steps, ended, strict=True)]
        if steps is not None:
            lengths = [len(completion) for completion in completions]
            steps = [_with_rest(*of_one) for of_one in zip(steps, totals, lengths, strict=True)]
        return Rewards(
            totals=totals,
            steps=steps,
            by_source=by_source,
            failed=failed,
            retries=retries,
            notes=notes,
        )

    def texts(self, completions: Sequence[Completion]) -> list[str]:
        """The text of each completion, without special tokens."""
        ids = [completion.token_ids.tolist() for completion in completions]
        return list(self._tokenizer.batch_decode(ids, skip_special_tokens=True))

    def raw_texts(self, token_ids: list[list[int]]) -> list[str]:
        """The text of each, with special tokens."""
        return list(self._tokenizer.batch_decode(token_ids, skip_special_tokens=False))

    def source(self, name: str) -> RewardSource:
        """The one with this name in the metrics."""
        return next(opened for source, opened in self._opened if source.name == name)

    def close(self) -> None:
        """End the processes of the sources."""
        while self._opened:
            _, opened = self._opened.pop()
            opened.close()

    def __enter__(self) -> RewardSources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_finite(totals: list[float]) -> None:
    for i, total in enumerate(totals):
        if not math.isfinite(total):
            raise RewardError(
                f"reward.sources: the weighted sum is {total} for completion {i}: lower the weights"
            )


def _with_rest(steps: TokenSteps, total: float, length: int) -> TokenSteps:
    """The steps, the last of which makes their sum the total."""
    rest = total - sum(score for _, score in steps)
    if steps:
        end, score = steps[-1]
        return [*steps[:-1], (end, score + rest)]
    return [(length - 1, rest)] if rest and length else []
