"""What PPO and TRPO share: a rollout of T steps of N environments, then updates on its samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from warpo.engine.config.control import ControlConfig, Ppo, Trpo
from warpo.engine.run.log import ReportProgress
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import ActorCritic, Adam
from warpo.engine.trainers.control.rollouts import Rollouts, Samples


class OnPolicyLearner:
    """Networks and optimizer of a run; one `iterate` is a rollout and its updates.

    Args:
        settings: the algorithm's section of config.
    """

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
        settings: Ppo | Trpo,
    ) -> None:
        self._config, self._device = config, device
        self.network = ActorCritic(
            spaces.observation,
            spaces.action,
            spaces.actions == "discrete",
            [settings.hidden_size] * settings.hidden_layers,
        ).to(device)
        # eps: detail 3 of iclr-blog-track.github.io/2022/03/25/ppo-implementation-details
        self._optimizer = Adam(self.network, config.lr, eps=1e-5)
        self._env_steps = settings.rollout_steps * config.num_envs
        self.rollouts = Rollouts(
            config,
            spaces,
            environments,
            self.network,
            steps=settings.rollout_steps,
            gae_lambda=settings.gae_lambda,
        )

    @property
    def stateful(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self._optimizer}

    def iterate(self, step: int, progress: ReportProgress) -> tuple[int, dict[str, float]]:
        """A rollout and its updates; returns the steps that it took, and metrics."""
        self.rollouts.collect(progress)
        return self._env_steps, self._update(self.rollouts.samples())

    def _update(self, samples: Samples) -> dict[str, float]:
        """Updates on a rollout; their metrics."""
        raise NotImplementedError

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The most probable action."""
        return self.rollouts.act(observation)

    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        return self.rollouts.outputs(observations)
