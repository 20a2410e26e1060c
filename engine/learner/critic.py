"""The critic: values of the states before each token of a completion.

A network of its own, with its own optimizer; or one linear layer on the policy's last hidden
states, which then learns with the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from warpo.engine.config.policy import Config
from warpo.engine.learner.optimizer import AdamW
from warpo.engine.learner.schedule import make_optimizer
from warpo.engine.learner.step import denominator
from warpo.engine.models.batch import Batch
from warpo.engine.models.layers import prepare_layers
from warpo.engine.models.model import token_values
from warpo.engine.models.scalar import load_scalar_model, token_scores
from warpo.engine.models.score import device_of
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.kernels import ops


class Critic:
    """The value model of a run.

    Args:
        policy: whose trunk a shared critic reads, and from whose directory others start.
    """

    def __init__(self, config: Config, policy: PreTrainedModel, ranks: Ranks = ONE_RANK) -> None:
        device = device_of(policy)
        self._ranks = ranks
        self.coef = config.critic.coef
        self._settings = config.critic
        self._max_grad_norm = config.update.max_grad_norm
        self._max_new_tokens = config.rollout.max_new_tokens
        self._policy = policy
        self._head: nn.Linear | None = None
        self._network: PreTrainedModel | None = None
        self._optimizer: AdamW | None = None
        if config.critic.model == "shared":
            size = policy.config.get_text_config().hidden_size
            self._head = nn.Linear(size, 1, bias=False, device=device)
            nn.init.zeros_(self._head.weight)
            return
        path = config.model if config.critic.model == "policy" else config.critic.model
        self._network = load_scalar_model(path, config.dtype, device)
        prepare_layers(self._network, config.update)
        self._optimizer, self._schedule = make_optimizer(
            self._network.named_parameters(),
            config.update,
            config.steps * config.update.per_step,
            lr=config.critic.lr,
            setting="critic.lr",
            ranks=ranks,
        )

    @property
    def is_shared(self) -> bool:
        return self._head is not None

    @property
    def value_head(self) -> nn.Linear:
        """Value head of a shared critic."""
        assert self._head is not None
        return self._head

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that the policy's optimizer has to step."""
        if self._head is not None:
            yield from self._head.named_parameters("critic_head")

    @property
    def stepped(self) -> list[nn.Parameter]:
        """Parameters that an optimizer of its own steps."""
        return [] if self._network is None else list(self._network.parameters())

    @torch.no_grad()
    def values(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Without gradient (M,) float32, of the states before each token, and with critic.bootstrap
        (B,), of the state after each sequence.
        """
        index = batch.logit_positions
        if self._settings.bootstrap:
            index = torch.cat([index, batch.gather_index[:, -1]])
        if self._head is not None:
            found = token_values(self._policy, self._head, batch, index)
        else:
            assert self._network is not None
            found = token_scores(self._network, batch, index)
        if not self._settings.bootstrap:
            return found, None
        return found[: batch.num_trained], found[batch.num_trained :]

    def denominator(self, batches: Sequence[Batch]) -> float:
        """The divisor of an optimizer step's loss, counted over all of its micro-batches."""
        return denominator(batches, self._settings.aggregation, self._max_new_tokens, self._ranks)

    def loss(self, values: Tensor, batch: Batch, total: float) -> tuple[Tensor, Tensor]:
        """Value loss of a micro-batch, clipped where critic.clip_range says so, over the
        denominator of the optimizer step; and the vector of `ops.value_loss`.
        """
        assert batch.returns is not None
        clip_range = self._settings.clip_range
        return ops.value_loss(
            values,
            batch.values,
            batch.returns,
            cu_seqlens=batch.cu_seqlens,
            clip_range=None if clip_range == "none" else clip_range,
            aggregation=self._settings.aggregation,
            denominator=total,
        )

    def train_step(self, batches: Sequence[Batch]) -> Tensor | None:
        """One optimizer step of a network of its own; the vector of `ops.value_loss`.

        Raises:
            TrainingError: the gradient is not finite. Nothing is stepped.
        """
        if self._network is None or self._optimizer is None:
            return None
        total = self.denominator(batches)
        metrics = []
        for batch in batches:
            values = token_scores(self._network, batch, batch.logit_positions)
            loss, batch_metrics = self.loss(values, batch, total)
            loss.backward()
            metrics.append(batch_metrics)
        self._optimizer.step(self._max_grad_norm)
        self._schedule.step()
        return ops.merge_value_metrics(self._ranks.gather(metrics))

    def skip(self, steps: int) -> None:
        """Go on as if so many optimizer steps had been taken."""
        if self._optimizer is not None:
            self._schedule.skip(steps)

    def state_dict(self) -> dict[str, Any]:
        module = self._head if self._network is None else self._network
        state: dict[str, Any] = {"weights": module.state_dict()}  # type: ignore[union-attr]
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
            state["schedule"] = self._schedule.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        module = self._head if self._network is None else self._network
        module.load_state_dict(state["weights"])  # type: ignore[union-attr]
        if self._optimizer is not None:
            self._optimizer.reset()
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
