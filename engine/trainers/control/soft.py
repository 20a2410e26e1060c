"""What soft actor-critics share: environment steps, the replay buffer, the order of an update and
the temperature.

    J(alpha) = mean of -log(alpha) (log pi(a | s) + target entropy)      eq. 18 of 1812.05905

Equation 18 has alpha instead of log(alpha), as which it is stored: both have the same sign and the
same zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.columns import Column
from warpo.engine.run.log import ReportProgress
from warpo.engine.run.plot import Panel
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import Adam
from warpo.engine.trainers.control.replay import ReplayBuffer, Steps


class SoftLearner:
    """Optimizers and replay buffer of a run; one `iterate` is a row of metrics. Its subclasses have
    the networks and their losses.

    Args:
        policy, q: networks that learn, as the subclass keeps them.
        width: numbers of an action in the buffer.
    """

    columns: tuple[Column, ...] = (
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

    metrics: tuple[str, ...] = ("loss/q", "loss/policy", "entropy/mean", "q/mean", "temperature")

    def __init__(
        self,
        config: ControlConfig,
        spaces: Spaces,
        environments: Environments,
        device: torch.device,
        *,
        policy: nn.Module,
        q: nn.Module,
        width: int,
    ) -> None:
        self._config, self._spaces, self._environments = config, spaces, environments
        self._device = device
        self.temperature = Temperature(config, spaces, device)
        self._learning = {"policy": policy, "q": q}
        self._policy_optimizer = Adam(policy, config.lr)
        self._q_optimizer = Adam(q, config.lr)
        self._buffer = ReplayBuffer(config.sac.buffer_size, spaces.observation, width, device)

    @property
    def stateful(self) -> dict[str, Any]:
        return {
            **self._learning,
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
        return taken, dict(zip(self.metrics, means, strict=True))

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The most probable action; of a squashed Gaussian its mode, squashed."""
        noise = torch.zeros(1, self._spaces.action, device=self._device)
        return self._to_environment(self._actions(observation[None], noise))[0]

    def update(self, steps: Steps) -> Tensor:
        """One gradient step of each network on a batch of steps; the metrics."""
        alpha = self.temperature.value
        q_loss, q = self._update_q(steps, alpha)
        policy_loss, logprobs = self._update_policy(steps.observations, alpha)
        self.temperature.update(logprobs)
        self._follow()
        return torch.stack([q_loss, policy_loss, -logprobs.mean(), q, alpha])

    def outputs(self, observations: np.ndarray) -> Tensor:
        """Return the networks' outputs for observations (N, D), as one vector."""
        raise NotImplementedError

    def _targets(self, steps: Steps, alpha: Tensor) -> Tensor:
        """Return what Q(s, a) should be, (B,)."""
        raise NotImplementedError

    def _taken_q(self, steps: Steps) -> Tensor:
        """Q_1 and Q_2 of the actions of steps, (2, B)."""
        raise NotImplementedError

    def _policy_loss(self, observations: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return J(policy), and log pi of each state, (B,), drawn or expected."""
        raise NotImplementedError

    def _follow(self) -> None:
        """Move the target network."""
        raise NotImplementedError

    def _noise(self, count: int) -> Tensor:
        """(count, A), what draws actions."""
        raise NotImplementedError

    def _actions(self, observations: np.ndarray, noise: Tensor) -> np.ndarray:
        """Actions of the policy as the buffer keeps them, (N, width)."""
        raise NotImplementedError

    def _uniform(self, count: int) -> np.ndarray:
        """The same, uniformly drawn."""
        raise NotImplementedError

    def _to_environment(self, actions: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _step(self, explore: bool) -> None:
        environments = self._environments
        observations = environments.observations
        if explore:
            actions = self._uniform(len(observations))
        else:
            actions = self._actions(observations, self._noise(len(observations)))
        rewards, terminated, _, last = environments.step(self._to_environment(actions))
        self._buffer.add(observations, actions, last, rewards, terminated)

    def _draw(self) -> Steps:
        return self._buffer.draw(self._config.sac.batch_size)

    def _update_q(self, steps: Steps, alpha: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            targets = self._targets(steps, alpha)
        q = self._taken_q(steps)
        # the sum over both, each a mean of squares / 2
        loss = nn.functional.mse_loss(q, targets.expand_as(q))
        self._q_optimizer.zero_grad()
        loss.backward()
        self._q_optimizer.step()
        return loss.detach(), q.detach().mean()

    def _update_policy(self, observations: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        loss, logprobs = self._policy_loss(observations, alpha)
        # no gradients of the Q-functions' weights
        parameters = list(self._learning["policy"].parameters())
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
        self._target = target_entropy(config, spaces)
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


def target_entropy(config: ControlConfig, spaces: Spaces) -> float:
    """Nats. "auto" of discrete actions is that of
    https://github.com/p-christ/Deep-Reinforcement-Learning-Algorithms-with-PyTorch, the code of
    https://arxiv.org/abs/1910.07207.
    """
    if config.sac.target_entropy != "auto":
        return config.sac.target_entropy
    return 0.98 * math.log(spaces.action) if spaces.actions == "discrete" else -spaces.action


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """target = (1 - weight) target + weight source, in place."""
    for mean, value in zip(target.parameters(), source.parameters(), strict=True):
        mean.lerp_(value, weight)
