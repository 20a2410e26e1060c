"""The reward of a completion: the weighted sum of what the sources say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from warpo.engine.data import columns
from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.rewards.calls import Calls
from warpo.engine.rewards.function import RewardFunction
from warpo.engine.rewards.http import RewardServer
from warpo.engine.rewards.math import MathAnswers
from warpo.engine.rewards.model import RewardModel
from warpo.engine.rewards.overlong import overlong_penalty
from warpo.engine.rewards.scores import Scored, Steps
from warpo.engine.rewards.sources import Source, parse_sources
from warpo.engine.rewards.steps import token_indices
from warpo.engine.types import Completion, Prompt, TokenSteps


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """What the sources say of B completions.

    Attributes:
        totals: B weighted sums over sources and steps.
        steps: (index of the step's last token in the completion, weighted score) of each step of
            each completion; None if no source scores steps. What other sources say of a whole
            completion counts to its last step.
        by_source: B scores of each source, without its weight.
        failed: completions that a source could not score, each counted for each such source.
        retries: calls that were made again.
        notes: what went wrong.
    """

    totals: list[float]
    steps: list[TokenSteps] | None
    by_source: dict[str, list[float]]
    failed: int
    retries: int
    notes: list[str]


class RewardSources:
    """All sources of `reward.sources`, ready to score. A context manager that ends their processes.

    Args:
        sources: "[WEIGHT * ]SOURCE" each, as sources.py reads them.
        deadline_s, on_error, workers, memory_gib: of calls of functions and servers.
        fields: names of the data fields there will be.
        tokenizer: that of the policy.
        max_new_tokens: length limit of a completion, for `overlong`.
        dtype, device, token_budget: for reward models.

    Raises:
        ConfigError, RewardError: a source cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        deadline_s: float,
        on_error: str,
        workers: int,
        memory_gib: float,
        fields: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        dtype: str,
        device: torch.device,
        token_budget: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        calls: dict[str, Any] = {
            "deadline_s": deadline_s,
            "fields": fields,
            "workers": workers,
        }
        models: dict[str, Any] = {
            "tokenizer": tokenizer,
            "dtype": dtype,
            "device": device,
            "token_budget": token_budget,
        }
        self._opened: list[tuple[Source, Any]] = []
        try:
            for source in parse_sources(sources):
                opened: Any = None
                if source.kind == "overlong" and int(source.target) > max_new_tokens:
                    raise ConfigError(
                        f"reward.sources: overlong:{source.target}: the penalty would begin before "
                        f"the first token: at most rollout.max_new_tokens = {max_new_tokens}"
                    )
                if source.kind == "function":
                    opened = RewardFunction(source.target, memory_gib=memory_gib, **calls)
                elif source.kind == "http":
                    opened = RewardServer(source.target, **calls)
                elif source.kind == "math":
                    opened = MathAnswers(deadline_s=deadline_s, fields=fields)
                elif source.kind in ("model", "process_model"):
                    opened = RewardModel(source.target, **models)
                if source.kind in ("function", "http"):
                    opened = Calls(opened, on_error=on_error, deadline_s=deadline_s)
                self._opened.append((source, opened))
        except BaseException:
            self.close()
            raise

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Rewards:
        """The rewards of completions, each of the prompt in the same place.

        Raises:
            RewardError: a source failed, or two of them score steps.
        """
        ids = [completion.token_ids.tolist() for completion in completions]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        totals, by_source = [0.0] * len(ids), {}
        failed, retries, notes = 0, 0, []
        steps: list[TokenSteps] | None = None
        for source, opened in self._opened:
            scored = self._ask(source, opened, prompts, completions, texts)
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
        if steps is not None:
            lengths = [len(completion_ids) for completion_ids in ids]
            steps = [_with_rest(*of_one) for of_one in zip(steps, totals, lengths, strict=True)]
        return Rewards(
            totals=totals,
            steps=steps,
            by_source=by_source,
            failed=failed,
            retries=retries,
            notes=notes,
        )

    def _ask(
        self,
        source: Source,
        opened: Any,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        texts: list[str],
    ) -> Scored:
        """Numbers, or steps by tokens, as one source gives them."""
        if source.kind == "overlong":
            lengths = [len(completion) for completion in completions]
            return Scored(scores=[self._overlong(n, int(source.target)) for n in lengths])
        if source.kind == "model":
            return Scored(scores=opened.totals(prompts, completions))
        if source.kind == "process_model":
            return Scored(scores=opened.steps(prompts, completions, texts))
        scored: Scored = opened(texts, columns(prompts))
        if not isinstance(scored.scores[0], list):
            return scored
        by_token: list[Any] = [
            self._by_token(completion.token_ids.tolist(), text, steps)
            for completion, text, steps in zip(completions, texts, scored.scores, strict=True)
        ]
        return replace(scored, scores=by_token)

    def close(self) -> None:
        """End the processes of the sources."""
        while self._opened:
            _, opened = self._opened.pop()
            if opened is not None:
                opened.close()

    def __enter__(self) -> RewardSources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _overlong(self, length: int, cache: int) -> float:
        return overlong_penalty(length, max_new_tokens=self._max_new_tokens, cache=cache)

    def _by_token(self, ids: list[int], text: str, steps: Steps) -> TokenSteps:
        """Steps that end at a token, from steps that end at a character."""
        indices = token_indices(self._decode, ids, text, [end for end, _ in steps])
        return [(index, score) for index, (_, score) in zip(indices, steps, strict=True)]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


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
