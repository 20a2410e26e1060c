"""Proximal policy optimisation with N environments and T steps: algorithm 1 of
https://arxiv.org/abs/1707.06347.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.log import Column, ReportProgress
from warpo.engine.run.plot import Panel
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import ActorCritic, Adam
from warpo.kernels import ops


class RolloutBuffer:
    """T steps of N environments, (T, N, ...)."""

    def __init__(self, steps: int, envs: int, observation: int, action: tuple[int, ...]) -> None:
        self.observations = np.empty((steps, envs, observation), np.float32)
        self.last_observations = np.empty((steps, envs, observation), np.float32)
        self.actions = np.empty((steps, envs, *action), np.float32 if action else np.int64)
        self.rewards = np.empty((steps, envs), np.float32)
        self.terminated = np.empty((steps, envs), np.bool_)
        self.truncated = np.empty((steps, envs), np.bool_)


class PpoLearner:
    """Networks and optimizer of a run; one `iterate` is a rollout and its updates."""

    columns = (
        Column("step", "step", "step", "d"),
        Column("episode/return", "return", "return", ".1f"),
        Column("eval/return", "eval", "eval return", ".1f"),
        Column("loss/value", "value", "value loss", ".2e"),
        Column("value/explained_variance", "expl", "explained", ".3f"),
        Column("kl/mean", "KL", "KL", ".2e"),
        Column("ratio/clip_frac", "clip", "clip fraction", ".4f"),
        Column("entropy/mean", "entropy", "entropy", ".3f"),
        Column("perf/env_steps_per_s", "steps/s", "steps/s", ".0f"),
    )
    panels = (
        Panel("return of an episode", (("episode/return", "train"), ("eval/return", "eval"))),
        Panel("value loss", (("loss/value", "train"),)),
        Panel("KL to the old policy (nats)", (("kl/mean", "train"),)),
        Panel("clip fraction", (("ratio/clip_frac", "train"),), limits=(0, None)),
        Panel("entropy (nats)", (("entropy/mean", "train"),)),
        Panel("environment steps per second", (("perf/env_steps_per_s", "train"),), (0, None)),
    )

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
    ) -> None:
        ppo = config.ppo
        self._config, self._spaces, self._environments = config, spaces, environments
        self._discrete = spaces.actions == "discrete"
        self.network = ActorCritic(
            spaces.observation,
            spaces.action,
            self._discrete,
            [ppo.hidden_size] * ppo.hidden_layers,
        ).to(device)
        # eps: detail 3 of iclr-blog-track.github.io/2022/03/25/ppo-implementation-details
        self._optimizer = Adam(self.network, config.lr, eps=1e-5)
        self._objective = ops.get_objective("ppo").replace(
            clip_low=ppo.clip_range, clip_high=ppo.clip_range, entropy_coef=ppo.entropy_coef
        )
        self._device = device
        action = () if self._discrete else (spaces.action,)
        self._rollout = RolloutBuffer(
            ppo.rollout_steps, config.num_envs, spaces.observation, action
        )

    @property
    def stateful(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self._optimizer}

    def iterate(self, step: int, progress: ReportProgress) -> tuple[int, dict[str, float]]:
        """A rollout and its updates; returns the steps that it took, and metrics."""
        self._collect(progress)
        tensors = self._samples()
        return self._config.ppo.rollout_steps * self._config.num_envs, self._update(*tensors)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The most probable action."""
        with torch.inference_mode():
            inputs = torch.from_numpy(observation.astype(np.float32)[None]).to(self._device)
            noise = torch.zeros(1, self._spaces.action, device=self._device)
            return self._to_environment(self.network.sample(inputs, noise).cpu().numpy())[0]

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
        return self.network.stack(inputs).flatten()

    def _to_environment(self, actions: np.ndarray) -> np.ndarray:
        if self._discrete:
            return actions + self._spaces.first
        return np.clip(actions, self._spaces.low, self._spaces.high)

    def _collect(self, progress: ReportProgress) -> None:
        rollout, environments = self._rollout, self._environments
        steps, envs = rollout.rewards.shape
        noise = self.network.draw_noise(steps, envs)
        with torch.inference_mode():
            for t in range(steps):
                rollout.observations[t] = environments.observations
                inputs = torch.from_numpy(rollout.observations[t]).to(self._device)
                actions = self.network.sample(inputs, noise[t]).cpu().numpy()
                rollout.actions[t] = actions
                rewards, terminated, truncated, last = environments.step(
                    self._to_environment(actions)
                )
                rollout.rewards[t], rollout.last_observations[t] = rewards, last
                rollout.terminated[t], rollout.truncated[t] = terminated, truncated
                progress(t + 1, steps)

    @torch.no_grad()
    def _samples(self) -> tuple[Tensor, ...]:
        """Observations, actions, old logprobs, advantages, returns and old values, (T N, ...)."""
        rollout = self._rollout
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
        logprobs, _, values = self.network.evaluate(flat_observations, flat_actions)
        last = torch.from_numpy(rollout.last_observations).to(self._device)
        final_values = torch.zeros_like(rewards)
        if rollout.truncated.any():
            final_values[truncated] = self.network.values(last[truncated])
        advantages, returns = ops.gae(
            rewards,
            values.view_as(rewards),
            gamma=self._config.gamma,
            gae_lambda=self._config.ppo.gae_lambda,
            terminated=terminated,
            truncated=truncated,
            final_values=final_values,
            last_values=self.network.values(last[-1]),
            time_dim=0,
        )
        return (
            flat_observations,
            flat_actions,
            logprobs,
            advantages.flatten(),
            returns.flatten(),
            values,
        )

    def _update(self, *samples: Tensor) -> dict[str, float]:
        """epochs x minibatches optimizer steps, and their mean metrics."""
        ppo, count = self._config.ppo, len(samples[0])
        results = []
        for _ in range(ppo.epochs):
            order = torch.randperm(count, device=self._device)
            for chosen in order.split(ppo.minibatch_size):
                results.append(self._optimizer_step(*(tensor[chosen] for tensor in samples)))
        policy, value, norms = zip(*results, strict=True)
        metrics = ops.policy_metrics(ops.sum_metrics(policy))
        values = ops.value_metrics(ops.merge_value_metrics(value))
        updates = len(results)
        return {
            "loss/policy": metrics["loss/policy"] / updates,
            "loss/value": values["loss/value"] / updates,
            "entropy/mean": metrics["entropy/mean"],
            "kl/mean": metrics["kl/approx"],
            "ratio/clip_frac": metrics["ratio/clip_frac_low"] + metrics["ratio/clip_frac_high"],
            "value/explained_variance": values["value/explained_variance"],
            "value/mean": values["value/mean"],
            "grad_norm": torch.stack(norms).mean().item(),
        }

    def _optimizer_step(
        self,
        observations: Tensor,
        actions: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        returns: Tensor,
        old_values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Equation 9 of the paper on one minibatch; metrics of policy and value, gradient norm."""
        ppo = self._config.ppo
        if ppo.normalize_advantages:
            advantages = ops.whiten(advantages[None])[0]
        logprobs, entropy, values = self.network.evaluate(observations, actions)
        # The operations take rows of tokens: a minibatch is one row.
        policy = ops.policy_loss(
            logprobs[None],
            old_logprobs[None],
            advantages[None],
            self._objective,
            entropy=entropy[None],
        )
        value = ops.value_loss(
            values[None],
            old_values[None],
            returns[None],
            clip_range=None if ppo.value_clip_range == "none" else ppo.value_clip_range,
        )
        self._optimizer.zero_grad()
        (policy.loss + ppo.value_coef * value.loss).backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), ppo.max_grad_norm)
        self._optimizer.step()
        return policy.metrics, value.metrics, norm
