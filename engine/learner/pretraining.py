"""Supervised examples that are mixed into every optimizer step of the policy."""

from __future__ import annotations

import numpy as np

from warpo.engine.config.policy import Config
from warpo.engine.data.examples import Examples
from warpo.engine.data.stream import RowRecord, draw_keys, random_keys
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.micro_batches import split_by_tokens
from warpo.engine.types import TokenSequence


class Pretraining:
    """The examples of pretraining.data (ppo_ptx)."""

    def __init__(self, config: Config, examples: Examples) -> None:
        self.record = RowRecord("pretraining.data", examples.keys)
        self._config, self._examples = config, examples

    def batches(self, count: int, step: int, update: int) -> list[Batch]:
        """Micro-batches of `count` examples, drawn by seed, step and update only."""
        config = self._config
        drawn = random_keys(draw_keys(self._examples.keys), config.seed, step, update)
        chosen = [self._examples[int(i)] for i in np.argsort(drawn, kind="stable")[:count]]
        sequences = [TokenSequence.of(e.prompt_ids, e.completions[0]) for e in chosen]
        return [pack(micro) for micro in split_by_tokens(sequences, config.update.token_budget)]
