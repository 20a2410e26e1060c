"""The reward model as it learns in the run, from pairs of completions that another source labels.

After every N steps, of the new pairs of these steps and a share rho of older ones:

    loss = 1 / |B| sum over the pairs of a batch B of -log sigmoid(r(x, chosen) - r(x, rejected))

a batch after the other, each pair in one of them. Then r(x, y) gets the bias that makes its mean
over their completions 0.

Source: DeepSeekMath, https://arxiv.org/abs/2402.03300 section 4.1.4 and algorithm 1 line 12, with
rho = 0.1.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warpo.engine.config.policy import Config
from warpo.engine.learner.losses import pair_gradients
from warpo.engine.learner.schedule import make_optimizer
from warpo.engine.models.batch import pack
from warpo.engine.models.files import load_tokenizer
from warpo.engine.models.layers import prepare_layers
from warpo.engine.models.micro_batches import TokenCount, split_rows
from warpo.engine.models.model import is_packed
from warpo.engine.models.score import device_of
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.rollout.labelled import LabelledPair
from warpo.engine.rollout.rewards.model import RewardModel
from warpo.engine.run import checkpoint
from warpo.engine.types import Metrics
from warpo.kernels import ops


class RewardModelLearner:
    """A reward model with its optimizer, the pairs since it last learned, and older ones.

    Args:
        source: the reward source that scores with it.
        every_steps: steps after which it learns.
    """

    def __init__(
        self, config: Config, source: RewardModel, every_steps: int, ranks: Ranks = ONE_RANK
    ) -> None:
        self._config, self._settings = config, config.reward_model
        self._source, self._every_steps, self._ranks = source, every_steps, ranks
        self._model = source.model.requires_grad_(True)
        prepare_layers(self._model, config.update)
        self._most_steps = self._batches(every_steps * self._settings.pairs_per_step)
        self._optimizer, self._schedule = make_optimizer(
            self._model.named_parameters(),
            config.update,
            config.steps // every_steps * self._most_steps,
            lr=config.reward_model.lr,
            setting="reward_model.lr",
            ranks=ranks,
        )
        self._new: list[LabelledPair] = []
        self._old: list[LabelledPair] = []
        self._seen = 0

    @property
    def stepped(self) -> list[nn.Parameter]:
        """Parameters that its optimizer steps."""
        return list(self._model.parameters())

    def update(self, step: int, pairs: Sequence[LabelledPair]) -> Metrics:
        """Take the pairs of a step, and learn where it is due after it.

        Raises:
            TrainingError: a gradient is not finite.
        """
        self._new += pairs
        if step % self._every_steps:
            return {}
        metrics = {"reward_model/pairs": float(len(self._new))}
        if not self._new:
            self._schedule.skip(self._most_steps)
            return metrics
        draw = random.Random(f"{self._config.seed} {step}")
        old = self._replayed(draw)
        metrics |= self._learn(old, draw)
        metrics |= {
            "reward_model/replayed": float(len(old)),
            "reward_model/bias": self._centre(old),
        }
        self._keep(draw)
        self._save(step)
        return metrics

    def _wanted(self, new: int) -> int:
        """So many older pairs that they are the share `replay` of all."""
        share = self._settings.replay
        return round(new * share / (1 - share))

    def _batches(self, new: int) -> int:
        """The most optimizer steps that so many new pairs take."""
        return -(-(new + self._wanted(new)) // self._settings.batch_size)

    def _replayed(self, draw: random.Random) -> list[LabelledPair]:
        return draw.sample(self._old, min(self._wanted(len(self._new)), len(self._old)))

    def _learn(self, old: list[LabelledPair], draw: random.Random) -> Metrics:
        new = draw.sample(self._new, len(self._new))
        count = -(-(len(new) + len(old)) // self._settings.batch_size)
        # from opposite ends, so that no batch gets one more of both
        batches = [new[i::count] + old[count - 1 - i :: count] for i in range(count)]
        vectors = [self._train_step(batch) for batch in batches]
        self._schedule.skip(max(0, self._most_steps - count))
        sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
        rows = [ops.reward_model_metrics(vector) for vector in vectors]
        values = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        return {
            f"reward_model/{short}": ((values[name] * sizes).sum() / sizes.sum()).item()
            for short, name in (
                ("loss", "loss/reward_model"),
                ("accuracy", "reward_model/accuracy"),
                ("margin", "reward_model/margin"),
            )
        }

    def _train_step(self, pairs: Sequence[LabelledPair]) -> Tensor:
        # A text may have more of the reward model's tokens than of the policy's.
        shared = is_packed(self._model)
        longest = max(TokenCount(shared=shared).with_items([pair]).read for pair in pairs)
        budget = max(self._config.update.token_budget, longest)
        device = device_of(self._model)
        micro = [[pairs[i] for i in part] for part in split_rows(pairs, budget, shared=shared)]
        packed = [pack([p.chosen for p in part] + [p.rejected for p in part]) for part in micro]
        vector = pair_gradients(
            self._model,
            [batch.to(device) for batch in packed],
            [torch.zeros(len(part), device=device) for part in micro],
            ranks=self._ranks,
        )
        self._optimizer.step(self._config.update.max_grad_norm)
        self._schedule.step()
        return vector

    def _centre(self, old: list[LabelledPair]) -> float:
        """Let the completions that it has learned from score 0 on average; returns the bias."""
        self._model.config.reward_bias = 0.0
        sequences = [*chain.from_iterable([*self._new, *old])]
        mean = float(np.mean(self._source.last_scores(sequences)))
        self._model.config.reward_bias = -mean
        return -mean

    def _keep(self, draw: random.Random) -> None:
        """Make the new pairs older ones: a uniform sample of all (algorithm R,
        https://doi.org/10.1145/3147.3165).
        """
        for pair in self._new:
            self._seen += 1
            if len(self._old) < self._settings.replay_size:
                self._old.append(pair)
            elif (place := draw.randrange(self._seen)) < len(self._old):
                self._old[place] = pair
        self._new = []

    def _save(self, step: int) -> None:
        """Keep the reward model as a checkpoint of its own, which other runs can load."""
        root = Path(self._config.output_dir) / "reward_model"
        folder = root / f"step-{step:06d}"
        checkpoint.save_model(folder, self._model, load_tokenizer(self._source.path))
        for other in root.glob("step-*"):
            if other != folder:
                shutil.rmtree(other)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self._model.state_dict(),
            "bias": getattr(self._model.config, "reward_bias", 0.0),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "new": _as_tensors(self._new),
            "old": _as_tensors(self._old),
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._model.load_state_dict(state["weights"])
        self._model.config.reward_bias = state["bias"]
        self._optimizer.reset()
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._new, self._old = _from_tensors(state["new"]), _from_tensors(state["old"])
        self._seen = state["seen"]


def _as_tensors(pairs: Sequence[LabelledPair]) -> dict[str, Tensor]:
    """ids: prompt, chosen and rejected completion of each pair; lengths (pairs, 3): of these."""
    parts = [
        part
        for chosen, rejected in pairs
        for part in (chosen.token_ids, rejected.token_ids[chosen.prompt_length :])
    ]
    lengths = [
        (chosen.prompt_length, chosen.num_trained, rejected.num_trained)
        for chosen, rejected in pairs
    ]
    ids = np.concatenate(parts) if parts else np.empty(0)
    return {
        "ids": torch.from_numpy(ids.astype(np.int32)),
        "lengths": torch.tensor(lengths, dtype=torch.int64).reshape(-1, 3),
    }


def _from_tensors(state: Mapping[str, Tensor]) -> list[LabelledPair]:
    parts = np.split(state["ids"].numpy(), np.cumsum(state["lengths"].numpy().ravel()))
    return [LabelledPair.of(*parts[i : i + 3]) for i in range(0, len(parts) - 1, 3)]
