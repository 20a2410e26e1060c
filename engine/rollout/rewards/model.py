"""Rewards from a checkpoint: a reward model, or a process reward model, in the engine's process.

What it reads of a completion stands in reader.py. A process reward model scores each step of a
completion at the last token of its text. Steps end with a newline, or with the text that the
attribute `step_separator` of the checkpoint's config.json holds, and the last one with the text of
the completion. With an empty separator each token is a step, but for special ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.models.batch import pack
from warpo.engine.models.files import read_config
from warpo.engine.models.micro_batches import split_rows
from warpo.engine.models.model import is_packed
from warpo.engine.models.scalar import load_scalar_model, token_scores
from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.reader import open_reader
from warpo.engine.rollout.rewards.scores import Scored
from warpo.engine.types import Completion, Prompt, TokenSequence, TokenSteps


class RewardModel:
    """The checkpoint of a reward model in a directory: its score at the last token of prompt +
    completion.

    Raises:
        ConfigError: the checkpoint is not one of a classifier with one label, or its tokenizer
            cannot read the prompts of the run.

    Attributes:
        model: without gradient, until what trains it asks for one.
        reader: what it reads of prompts and completions.
    """

    def __init__(self, path: str, context: SourceContext) -> None:
        config = read_config(path)
        if not any("Classification" in name for name in config.architectures or ()):
            found = ", ".join(config.architectures or ["nothing"])
            raise ConfigError(
                f"{path} is not a reward model but {found}: "
                "train one with algorithm: bradley_terry, k_wise or process_reward"
            )
        self.path = path
        self.reader = open_reader(path, config, context)
        self._token_budget = context.token_budget
        self._device = context.device
        self._separator = getattr(config, "step_separator", "\n")
        self.model = load_scalar_model(path, context.dtype, context.device)
        self.model.requires_grad_(False).eval()

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """The score at the last token of each prompt + completion."""
        sequences = self.reader.sequences(prompts, completions, texts)
        return Scored(scores=self.last_scores(sequences))

    def last_scores(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """The score at the last token of each sequence."""
        last = [[sequence.num_trained - 1] for sequence in sequences]
        return [row[0] for row in self._scores(sequences, last)]

    def close(self) -> None:
        """Give the memory of the weights back."""
        del self.model

    @torch.no_grad()
    def _scores(
        self, sequences: Sequence[TokenSequence], indices: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Scores at the given tokens of each completion, in packed micro-batches."""
        scores: list[list[float]] = [[] for _ in sequences]
        # A text may have more of the reward model's tokens than of the policy's.
        budget = max(self._token_budget, *(sequence.num_tokens for sequence in sequences))
        for rows in split_rows(sequences, budget, shared=is_packed(self.model)):
            batch = pack([sequences[row] for row in rows]).to(self._device)
            places = [
                batch.gather_index[number, sequences[row].prompt_length + index]
                for number, row in enumerate(rows)
                for index in indices[row]
            ]
            found = iter(token_scores(self.model, batch, torch.stack(places)).tolist())
            for row in rows:
                scores[row] = list(itertools.islice(found, len(indices[row])))
        self._check_finite(scores)
        return scores

    def _check_finite(self, scores: list[list[float]]) -> None:
        for i, row in enumerate(scores):
            if not all(map(math.isfinite, row)):
                raise RewardError(f"reward model {self.path} gave {row} for completion {i}")


class ProcessRewardModel(RewardModel):
    """A reward model that scores each step of a completion, at the last token of its text."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """(token, score) of each step of each completion."""
        found = [
            self.reader.steps(prompt, completion, text, self._separator)
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]
        sequences = self.reader.sequences(prompts, completions, texts)
        scores = self._scores(sequences, [steps.read for steps in found])
        rows: list[TokenSteps] = [
            list(zip(steps.sampled, row, strict=True))
            for steps, row in zip(found, scores, strict=True)
        ]
        return Scored(scores=rows)
