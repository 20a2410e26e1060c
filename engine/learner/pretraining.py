"""Supervised examples that are mixed into every optimizer step of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from warpo.engine.config.policy import Config
from warpo.engine.data.examples import Examples
from warpo.engine.data.stream import RowRecord, draw_keys, random_keys
from warpo.engine.learner.losses import supervised_gradients
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.micro_batches import split_by_tokens
from warpo.engine.models.score import device_of
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.types import TokenSequence


class Pretraining:
    """The examples of pretraining.data (ppo_ptx)."""

    def __init__(self, config: Config, examples: Examples, ranks: Ranks = ONE_RANK) -> None:
        self.record = RowRecord("pretraining.data", examples.keys)
        self._config, self._examples, self._ranks = config, examples, ranks

    def batches(self, count: int, step: int, update: int) -> list[Batch]:
        """Micro-batches of `count` examples, drawn by seed, step and update only."""
        config = self._config
        drawn = random_keys(draw_keys(self._examples.keys), config.seed, step, update)
        chosen = [self._examples[int(i)] for i in np.argsort(drawn, kind="stable")[:count]]
        sequences = [TokenSequence.of(e.prompt_ids, e.completions[0]) for e in chosen]
        return [pack(micro) for micro in split_by_tokens(sequences, config.update.token_budget)]

    def gradients(
        self, model: PreTrainedModel, batches: Sequence[Batch], step: int, update: int, coef: float
    ) -> Tensor:
        """Add coef x the gradients of as many examples as an optimizer step has sequences in its
        micro-batches; returns what `supervised_gradients` does.
        """
        drawn = self.batches(sum(batch.num_sequences for batch in batches), step, update)
        return supervised_gradients(
            model,
            [batch.to(device_of(model)) for batch in drawn],
            coef=coef,
            aggregation=self._config.pretraining.aggregation,
            ranks=self._ranks,
        )
