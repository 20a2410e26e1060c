"""Soft actor-critic with twin Q-functions and a learned temperature: algorithm 1 of
https://arxiv.org/abs/1812.05905.

    V(s')     = min_i target_i(s', a') - alpha log pi(a' | s')                     eq. 3
    y         = r + gamma (1 - terminated) V(s')                                   eq. 2
    J(Q_i)    = mean of (Q_i(s, a) - y)^2 / 2                                      eq. 5
    J(policy) = mean of alpha log pi(a | s) - min_i Q_i(s, a)                      eq. 9
    target_i  = (1 - polyak) target_i + polyak Q_i

with a ~ pi(s), a' ~ pi(s').
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from warpo.engine.config.control import ControlConfig
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.replay import Steps
from warpo.engine.trainers.control.soft import polyak_
from warpo.engine.trainers.control.squashed import SquashedLearner
from warpo.kernels import ops


class SacLearner(SquashedLearner):
    """Its targets are of averages of the Q-functions."""

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
    ) -> None:
        super().__init__(config, spaces, environments, device)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)

    @property
    def stateful(self) -> dict[str, Any]:
        return {**super().stateful, "target_q": self.target_q}

    def _targets(self, steps: Steps, alpha: Tensor) -> Tensor:
        next_actions, next_logprobs = self.policy(
            steps.next_observations, self._noise(len(steps.rewards))
        )
        next_q = self.target_q(steps.next_observations, next_actions)
        return ops.soft_q_targets(
            steps.rewards,
            steps.terminated,
            next_q[0],
            next_q[1],
            next_logprobs,
            alpha=alpha,
            gamma=self._config.gamma,
        )

    def _follow(self) -> None:
        polyak_(self.target_q, self.q, self._config.sac.polyak)
