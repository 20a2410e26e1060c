"""What soft actor-critics of continuous actions share: a squashed Gaussian policy, two Q-functions
of observation and action, and the policy's loss

    J(policy) = mean of alpha log pi(a | s) - min_i Q_i(s, a),  a ~ pi(s)    eq. 9 of 1812.05905
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from warpo.engine.config.control import ControlConfig
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import SquashedPolicy, TwinQ
from warpo.engine.trainers.control.replay import Steps
from warpo.engine.trainers.control.soft import SoftLearner


class SquashedLearner(SoftLearner):
    """Policy and Q-functions; its subclasses have the target."""

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
    ) -> None:
        hidden = [config.sac.hidden_size] * config.sac.hidden_layers
        self.policy = SquashedPolicy(spaces.observation, spaces.action, hidden).to(device)
        self.q = TwinQ(spaces.observation, spaces.action, hidden).to(device)
        super().__init__(
            config,
            spaces,
            environments,
            device,
            policy=self.policy,
            q=self.q,
            width=spaces.action,
        )

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
        gaussian = self.policy.stack.only(0, inputs)
        values = self.q(inputs, gaussian[:, : self._spaces.action].tanh())
        return torch.cat([gaussian.flatten(), values.flatten()])

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, self._spaces.action, device=self._device)

    def _actions(self, observations: np.ndarray, noise: Tensor) -> np.ndarray:
        """Squashed actions, (N, A) in [-1, 1]."""
        with torch.inference_mode():
            inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
            return self.policy(inputs, noise)[0].cpu().numpy()

    def _uniform(self, count: int) -> np.ndarray:
        return torch.rand(count, self._spaces.action).mul_(2).sub_(1).numpy()

    def _to_environment(self, actions: np.ndarray) -> np.ndarray:
        low, high = self._spaces.low, self._spaces.high
        # clip: rounding may leave the bounds, and environments check them
        return np.clip(low + (actions + 1) * 0.5 * (high - low), low, high)

    def _taken_q(self, steps: Steps) -> Tensor:
        return self.q(steps.observations, steps.actions)

    def _policy_loss(self, observations: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        actions, logprobs = self.policy(observations, self._noise(len(observations)))
        q = self.q(observations, actions)
        return (alpha * logprobs - torch.minimum(q[0], q[1])).mean(), logprobs
