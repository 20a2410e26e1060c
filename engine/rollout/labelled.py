"""Pairs of sampled completions that a reward model learns from, in the tokens that it reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from warpo.engine.rollout.evaluate import Verdict
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.rollout.rewards.model import RewardModel
from warpo.engine.types import Completion, Prompt, TokenIds, TokenSequence


class LabelledPair(NamedTuple):
    """Two completions of a prompt, of which the first has the higher label."""

    chosen: TokenSequence
    rejected: TokenSequence

    @classmethod
    def of(cls, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds) -> LabelledPair:
        """From the ids of the prompt and of both completions."""
        return cls(*(TokenSequence.of(prompt, ids) for ids in (chosen, rejected)))

    @property
    def sequences(self) -> LabelledPair:
        return self


class PairSource:
    """The pairs of a step: two completions of a prompt with unequal labels are one.

    Args:
        rewards: the sources of the run.
        model, labels: names of the one that is to learn, and of the one that labels.
        limit: most pairs of a step, drawn at random from all of it.
    """

    def __init__(
        self, rewards: RewardSources, *, model: str, labels: str, limit: int, seed: int
    ) -> None:
        source = rewards.source(model)
        assert isinstance(source, RewardModel)
        self.model = source
        self._rewards, self._labels, self._limit, self._seed = rewards, labels, limit, seed

    def pairs(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Completion]],
        verdicts: Sequence[Sequence[Verdict]],
        step: int,
    ) -> list[LabelledPair]:
        """Those of the groups of a step; the same ones whenever the step is taken."""
        found = []
        for number, group in enumerate(verdicts):
            labels = [verdict.by_source[self._labels] for verdict in group]
            found += [
                (number, better, worse)
                for better, worse in permutations(range(len(labels)), 2)
                if labels[better] > labels[worse]
            ]
        if len(found) > self._limit:
            found = random.Random(f"{self._seed} {step}").sample(found, self._limit)
        return [self._pair(prompts[i], groups[i][b], groups[i][w]) for i, b, w in found]

    def _pair(self, prompt: Prompt, chosen: Completion, rejected: Completion) -> LabelledPair:
        both = [chosen, rejected]
        better, worse = self.model.reader.sequences([prompt] * 2, both, self._rewards.texts(both))
        split = better.prompt_length
        return LabelledPair.of(
            better.token_ids[:split], better.token_ids[split:], worse.token_ids[split:]
        )
