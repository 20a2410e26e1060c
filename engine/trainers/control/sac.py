"""Soft actor-critic with twin Q-functions and a learned temperature: algorithm 1 of
https://arxiv.org/abs/1812.05905.

    V(s')     = min_i target_i(s', a') - alpha log pi(a' | s')                     eq. 3
    y         = r + gamma (1 - terminated) V(s')                                   eq. 2
    J(Q_i)    = mean of (Q_i(s, a) - y)^2 / 2                                      eq. 5
    J(policy) = mean of alpha log pi(a | s) - min_i Q_i(s, a)                      eq. 9
    J(alpha)  = mean of -log(alpha) (log pi(a | s) + target entropy)               eq. 18
    target_i  = (1 - polyak) target_i + polyak Q_i

with a ~ pi(s), a' ~ pi(s'). Equation 18 has alpha instead of log(alpha), as which it is
stored: both have the same sign and the same zero.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.log import Column, ReportProgress
from warpo.engine.run.plot import Panel
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import Adam, SquashedPolicy, TwinQ
from warpo.engine.trainers.control.replay import ReplayBuffer, Steps
from warpo.kernels import ops

_METRICS = ("loss/q", "loss/policy", "entropy/mean", "q/mean", "temperature")


class SacLearner:
    """Networks, optimizers and replay buffer of a run; one `iterate` is a row of metrics."""

    columns = (
        Column("step", "step", "step", "d"),
        Column("episode/return", "return", "return", ".1f"),
        Column("eval/return", "eval", "eval return", ".1f"),
        Column("loss/q", "Q loss", "Q loss", ".2e"),
        Column("q/mean", "Q", "Q", ".2f"),
        Column("temperature", "temp", "temperature", ".4f"),
        Column("entropy/mean", "entropy", "entropy", ".3f"),
        Column("perf/env_steps_per_s", "steps/s", "steps/s", ".0f"),
    )
    panels = (
        Panel("return of an episode", (("episode/return", "train"), ("eval/return", "eval"))),
        Panel("Q loss", (("loss/q", "train"),)),
        Panel("Q", (("q/mean", "train"),)),
        Panel("temperature", (("temperature", "train"),), limits=(0, None)),
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
        sac = config.sac
        hidden = [sac.hidden_size] * sac.hidden_layers
        self._config, self._spaces, self._environments = config, spaces, environments
        self._device = device
        self.policy = SquashedPolicy(spaces.observation, spaces.action, hidden).to(device)
        self.q = TwinQ(spaces.observation, spaces.action, hidden).to(device)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.temperature = Temperature(config, spaces, device)
        self._policy_optimizer = Adam(self.policy, config.lr)
        self._q_optimizer = Adam(self.q, config.lr)
        self._buffer = ReplayBuffer(sac.buffer_size, spaces.observation, spaces.action, device)

    @property
    def stateful(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "q": self.q,
            "target_q": self.target_q,
            "policy_optimizer": self._policy_optimizer,
            "q_optimizer": self._q_optimizer,
            "buffer": self._buffer,
        } | self.temperature.stateful

    def iterate(self, step: int, progress: ReportProgress) -> tuple[int, dict[str, float]]:
        """Environment steps and updates of a row; returns the number of those, and metrics."""
        sac, envs = self._config.sac, self._config.num_envs
        wanted = min(sac.steps_per_row, self._config.steps - step)
        taken, results = 0, []
        while taken < wanted:
            self._step(explore=step + taken < sac.learning_starts)
            taken += envs
            if step + taken >= sac.learning_starts:
                results += [self.update(self._draw()) for _ in range(sac.updates_per_step)]
            progress(taken, wanted)
        if not results:
            return taken, {}
        means = torch.stack(results).mean(0).tolist()
        return taken, dict(zip(_METRICS, means, strict=True))

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The mode of the Gaussian, squashed."""
        noise = torch.zeros(1, self._spaces.action, device=self._device)
        return self._to_environment(self._actions(observation[None], noise))[0]

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
        gaussian = self.policy.stack.only(0, inputs)
        values = self.q(inputs, gaussian[:, : self._spaces.action].tanh())
        return torch.cat([gaussian.flatten(), values.flatten()])

    def update(self, steps: Steps) -> Tensor:
        """One gradient step of each network on a batch of steps; the metrics."""
        alpha = self.temperature.value
        q_loss, q = self._update_q(steps, alpha)
        policy_loss, logprobs = self._update_policy(steps.observations, alpha)
        self.temperature.update(logprobs)
        polyak_(self.target_q, self.q, self._config.sac.polyak)
        return torch.stack([q_loss, policy_loss, -logprobs.mean(), q, alpha])

    def _step(self, explore: bool) -> None:
        environments = self._environments
        observations = environments.observations
        if explore:
            actions = torch.rand(len(observations), self._spaces.action).mul_(2).sub_(1).numpy()
        else:
            actions = self._actions(observations, self._noise(len(observations)))
        rewards, terminated, _, last = environments.step(self._to_environment(actions))
        self._buffer.add(observations, actions, last, rewards, terminated)

    def _draw(self) -> Steps:
        return self._buffer.draw(self._config.sac.batch_size)

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, self._spaces.action, device=self._device)

    def _actions(self, observations: np.ndarray, noise: Tensor) -> np.ndarray:
        """Squashed actions, (N, A) in [-1, 1]."""
        with torch.inference_mode():
            inputs = torch.from_numpy(observations.astype(np.float32)).to(self._device)
            return self.policy(inputs, noise)[0].cpu().numpy()

    def _to_environment(self, actions: np.ndarray) -> np.ndarray:
        low, high = self._spaces.low, self._spaces.high
        # clip: rounding may leave the bounds, and environments check them
        return np.clip(low + (actions + 1) * 0.5 * (high - low), low, high)

    def _update_q(self, steps: Steps, alpha: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            next_actions, next_logprobs = self.policy(
                steps.next_observations, self._noise(len(steps.rewards))
            )
            next_q = self.target_q(steps.next_observations, next_actions)
            targets = ops.soft_q_targets(
                steps.rewards,
                steps.terminated,
                next_q[0],
                next_q[1],
                next_logprobs,
                alpha=alpha,
                gamma=self._config.gamma,
            )
        q = self.q(steps.observations, steps.actions)
        # the sum over both, each a mean of squares / 2
        loss = nn.functional.mse_loss(q, targets.expand_as(q))
        self._q_optimizer.zero_grad()
        loss.backward()
        self._q_optimizer.step()
        return loss.detach(), q.detach().mean()

    def _update_policy(self, observations: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        actions, logprobs = self.policy(observations, self._noise(len(observations)))
        q = self.q(observations, actions)
        loss = (alpha * logprobs - torch.minimum(q[0], q[1])).mean()
        # no gradients of the Q-functions' weights
        parameters = list(self.policy.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        self._policy_optimizer.step()
        return loss.detach(), logprobs.detach()


class Temperature:
    """Weight alpha of the entropy: fixed, or learned so that the entropy meets its target."""

    def __init__(self, config: ControlConfig, spaces: Spaces, device: torch.device) -> None:
        sac = config.sac
        self.learned = sac.temperature == "learned"
        start = 1.0 if sac.temperature == "learned" else sac.temperature
        self._target = -spaces.action if sac.target_entropy == "auto" else sac.target_entropy
        self._fixed = torch.tensor(start, device=device)
        self._log = nn.ParameterDict({"log": torch.zeros((), device=device)})
        self._optimizer = Adam(self._log, config.lr)

    @property
    def value(self) -> Tensor:
        """(), a constant."""
        return self._log["log"].detach().exp() if self.learned else self._fixed

    @property
    def stateful(self) -> dict[str, Any]:
        if not self.learned:
            return {}
        return {"temperature": self._log, "temperature_optimizer": self._optimizer}

    def update(self, logprobs: Tensor) -> None:
        """A gradient step on -log(alpha) (mean of logprobs + target entropy)."""
        if self.learned:
            self._log["log"].grad = -(logprobs.mean() + self._target)
            self._optimizer.step()


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target = (1 - weight) target + weight source, in place."""
    for mean, value in zip(target.parameters(), source.parameters(), strict=True):
        mean.lerp_(value, weight)
