"""Rollouts of on-policy algorithms: T steps of N environments, and the samples that they make."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.log import ReportProgress
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import ActorCritic
from warpo.kernels import ops


class Samples(NamedTuple):
    """Steps of a rollout, (T N, ...) each."""

    observations: Tensor
    actions: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor


class RolloutBuffer:
    """T steps of N environments, (T, N, ...)."""

    def __init__(self, steps: int, envs: int, observation: int, action: tuple[int, ...]) -> None:
        self.observations = np.empty((steps, envs, observation), np.float32)
        self.last_observations = np.empty((steps, envs, observation), np.float32)
        self.actions = np.empty((steps, envs, *action), np.float32 if action else np.int64)
        self.rewards = np.empty((steps, envs), np.float32)
        self.terminated = np.empty((steps, envs), np.bool_)
        self.truncated = np.empty((steps, envs), np.bool_)


class Rollouts:
    """Steps environments with a network, and estimates advantages of what happened.

    Args:
        steps: T.
        gae_lambda: of generalised advantage estimation.
    """

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        network: ActorCritic,
        *,
        steps: int,
        gae_lambda: float,
    ) -> None:
        self._spaces, self._environments, self._network = spaces, environments, network
        self._gamma, self._gae_lambda = config.gamma, gae_lambda
        self._discrete = spaces.actions == "discrete"
        action = () if self._discrete else (spaces.action,)
        self.buffer = RolloutBuffer(steps, config.num_envs, spaces.observation, action)

    @property
    def _device(self) -> torch.device:
        return self._network.stack.weights[0].device

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The most probable action."""
        with torch.inference_mode():
            inputs = torch.from_numpy(observation.astype(np.float32)[None]).to(self._device)
            noise = torch.zeros(1, self._spaces.action, device=self._device)
            return self.to_environment(self._network.sample(inputs, noise).cpu().numpy())[0]

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
        return self._network.stack(inputs).flatten()

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        if self._discrete:
            return actions + self._spaces.first
        return np.clip(actions, self._spaces.low, self._spaces.high)

    def collect(self, progress: ReportProgress) -> None:
        """Take the steps of a rollout."""
        rollout, environments = self.buffer, self._environments
        steps, envs = rollout.rewards.shape
        noise = self._network.draw_noise(steps, envs)
        with torch.inference_mode():
            for t in range(steps):
                rollout.observations[t] = environments.observations
                inputs = torch.from_numpy(rollout.observations[t]).to(self._device)
                actions = self._network.sample(inputs, noise[t]).cpu().numpy()
                rollout.actions[t] = actions
                rewards, terminated, truncated, last = environments.step(
                    self.to_environment(actions)
                )
                rollout.rewards[t], rollout.last_observations[t] = rewards, last
                rollout.terminated[t], rollout.truncated[t] = terminated, truncated
                progress(t + 1, steps)

    @torch.no_grad()
    def samples(self) -> Samples:
        """What the rollout gives to learn from."""
        rollout = self.buffer
        observations, actions, rewards, terminated, truncated = (
            torch.from_numpy(array).to(self._device)
            for array in (
                rollout.observations,
                rollout.actions,
                rollout.rewards,
                rollout.terminated,
                rollout.truncated,
            )
        )
        flat_observations, flat_actions = observations.flatten(0, 1), actions.flatten(0, 1)
        logprobs, _, values = self._network.evaluate(flat_observations, flat_actions)
        last = torch.from_numpy(rollout.last_observations).to(self._device)
        final_values = torch.zeros_like(rewards)
        if rollout.truncated.any():
            final_values[truncated] = self._network.values(last[truncated])
        advantages, returns = ops.gae(
            rewards,
            values.view_as(rewards),
            gamma=self._gamma,
            gae_lambda=self._gae_lambda,
            terminated=terminated,
            truncated=truncated,
            final_values=final_values,
            last_values=self._network.values(last[-1]),
            time_dim=0,
        )
        return Samples(
            flat_observations,
            flat_actions,
            logprobs,
            advantages.flatten(),
            returns.flatten(),
            values,
        )
