"""Soft actor-critic with a value function of its own: algorithm 1 of
https://arxiv.org/abs/1801.01290.

    J(V)      = mean of (V(s) - (min_i Q_i(s, a) - alpha log pi(a | s)))^2 / 2     eq. 5
    y         = r + gamma (1 - terminated) target(s')                              eq. 8
    J(Q_i)    = mean of (Q_i(s, a) - y)^2 / 2                                      eq. 7
    J(policy) = mean of alpha log pi(a | s) - min_i Q_i(s, a)                      eq. 12
    target    = (1 - polyak) target + polyak V

with a ~ pi(s), but for J(Q_i), where it is the buffer's. The paper has alpha = 1 and scales the
rewards, which is the same as alpha = 1 / scale.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.columns import Column
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import Adam, Value
from warpo.engine.trainers.control.replay import Steps
from warpo.engine.trainers.control.soft import polyak_
from warpo.engine.trainers.control.squashed import SquashedLearner


class SacVLearner(SquashedLearner):
    """Its targets are of the average of a value function."""

    columns = (
        *SquashedLearner.columns[:3],
        Column("loss/v", "V loss", "V loss", ".2e"),
        *SquashedLearner.columns[3:],
    )
    metrics = (*SquashedLearner.metrics, "loss/v")

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
    ) -> None:
        super().__init__(config, spaces, environments, device)
        hidden = [config.sac.hidden_size] * config.sac.hidden_layers
        self.v = Value(spaces.observation, hidden).to(device)
        self.target_v = copy.deepcopy(self.v).requires_grad_(False)
        self._v_optimizer = Adam(self.v, config.lr)

    @property
    def stateful(self) -> dict[str, Any]:
        own = {"v": self.v, "target_v": self.target_v, "v_optimizer": self._v_optimizer}
        return {**super().stateful, **own}

    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
        with torch.inference_mode():
            return torch.cat([super().outputs(observations), self.v(inputs)])

    def update(self, steps: Steps) -> Tensor:
        """One gradient step of each network on a batch of steps; the metrics."""
        v_loss = self._update_v(steps.observations, self.temperature.value)
        return torch.cat([super().update(steps), v_loss[None]])

    def _update_v(self, observations: Tensor, alpha: Tensor) -> Tensor:
        with torch.no_grad():
            actions, logprobs = self.policy(observations, self._noise(len(observations)))
            targets = self.q(observations, actions).amin(0) - alpha * logprobs
        loss = 0.5 * nn.functional.mse_loss(self.v(observations), targets)
        self._v_optimizer.zero_grad()
        loss.backward()
        self._v_optimizer.step()
        return loss.detach()

    def _targets(self, steps: Steps, alpha: Tensor) -> Tensor:
        values = self.target_v(steps.next_observations)
        return steps.rewards + self._config.gamma * values.masked_fill(steps.terminated, 0)

    def _follow(self) -> None:
        polyak_(self.target_v, self.v, self._config.sac.polyak)
