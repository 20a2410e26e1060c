"""Soft actor-critic of discrete actions, https://arxiv.org/abs/1910.07207: soft policy iteration
with the expectations over the actions in closed form.

    V(s')     = sum over a of pi(a | s') (min_i target_i(s', a) - alpha log pi(a | s'))    eq. 10
    y         = r + gamma (1 - terminated) V(s')
    J(Q_i)    = mean of (Q_i(s, a) - y)^2 / 2
    J(policy) = mean of sum over a of pi(a | s) (alpha log pi(a | s) - min_i Q_i(s, a))    eq. 12
    J(alpha)  = mean of log(alpha) (entropy of pi(s) - target entropy)                     eq. 11
    target_i  = (1 - polyak) target_i + polyak Q_i

J(policy) is alpha KL(pi(s), exp(min_i Q_i(s) / alpha) / Z) but for a constant of s.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warpo.engine.config.control import ControlConfig
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import Stack
from warpo.engine.trainers.control.replay import Steps
from warpo.engine.trainers.control.soft import SoftLearner, polyak_
from warpo.kernels import ops


class SacDiscreteLearner(SoftLearner):
    """A categorical policy, two Q-functions with an output for each action, and their averages."""

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
    ) -> None:
        hidden = [config.sac.hidden_size] * config.sac.hidden_layers
        sizes = [spaces.observation, *hidden, spaces.action]
        self.policy = Stack(1, sizes, torch.relu).to(device)
        self.q = Stack(2, sizes, torch.relu).to(device)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        super().__init__(
            config, spaces, environments, device, policy=self.policy, q=self.q, width=1
        )

    @property
    def stateful(self) -> dict[str, Any]:
        return {**super().stateful, "target_q": self.target_q}

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
        return torch.cat([self.policy(inputs).flatten(), self.q(inputs).flatten()])

    def _noise(self, count: int) -> Tensor:
        """Gumbel, whose largest sum with the logits is a draw."""
        noise = torch.empty(count, self._spaces.action, device=self._device)
        return noise.exponential_().log_().neg_()

    def _actions(self, observations: np.ndarray, noise: Tensor) -> np.ndarray:
        """Numbers of actions from 0, (N, 1)."""
        with torch.inference_mode():
            inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
            return (self.policy.only(0, inputs) + noise).argmax(1, keepdim=True).cpu().numpy()

    def _uniform(self, count: int) -> np.ndarray:
        return torch.randint(self._spaces.action, (count, 1)).numpy()

    def _to_environment(self, actions: np.ndarray) -> np.ndarray:
        return actions[:, 0] + self._spaces.first

    def _targets(self, steps: Steps, alpha: Tensor) -> Tensor:
        logprobs, probs = self._policy(steps.next_observations)
        next_q = (probs * self.target_q(steps.next_observations).amin(0)).sum(1)
        return ops.soft_q_targets(
            steps.rewards,
            steps.terminated,
            next_q,
            next_q,
            (probs * logprobs).sum(1),
            alpha=alpha,
            gamma=self._config.gamma,
        )

    def _taken_q(self, steps: Steps) -> Tensor:
        q = self.q(steps.observations)
        return q.gather(2, steps.actions.long().expand(2, -1, -1))[:, :, 0]

    def _policy_loss(self, observations: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, probs = self._policy(observations)
        with torch.no_grad():
            q = self.q(observations).amin(0)
        loss = (probs * (alpha * logprobs - q)).sum(1).mean()
        return loss, (probs * logprobs).sum(1)

    def _policy(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """log pi and pi of every action, (B, A)."""
        logprobs = self.policy.only(0, observations).log_softmax(1)
        return logprobs, logprobs.exp()

    def _follow(self) -> None:
        polyak_(self.target_q, self.q, self._config.sac.polyak)
