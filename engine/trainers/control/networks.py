"""The small networks of control: policies, value functions and twin Q-functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from warpo.kernels import ops

Activation = Callable[[Tensor], Tensor]


class Adam(torch.optim.Adam):
    """torch's, fused. A state that is loaded leaves the learning rate as this run has it."""

    def __init__(self, module: nn.Module, lr: float, eps: float = 1e-8) -> None:
        super().__init__(module.parameters(), lr=lr, eps=eps, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)


class Stack(nn.Module):
    """`count` networks of one shape, computed together: the time of small networks is the number
    of calls, 380 us for forward, backward and Adam of two with 64 units on a batch of 64, against
    560 one after the other (AMD EPYC, 2 cores).

    Attributes:
        weights: weights of each layer, (count, inputs, outputs).
        biases: biases of each layer, (count, 1, outputs).
    """

    def __init__(self, count: int, sizes: list[int], activation: Activation) -> None:
        super().__init__()
        self.count, self.activation = count, activation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            # the initial values of nn.Linear
            bound = 1 / math.sqrt(inputs)
            weight, bias = torch.empty(count, inputs, outputs), torch.empty(count, 1, outputs)
            self.weights.append(nn.Parameter(weight.uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(bias.uniform_(-bound, bound)))

    @torch.no_grad()
    def orthogonal(self, gains: list[float]) -> None:
        """Orthogonal weights times the gain of the layer, zero biases."""
        for weight, bias, gain in zip(self.weights, self.biases, gains, strict=True):
            for one in weight:
                one.copy_(nn.init.orthogonal_(torch.empty(one.shape[::-1]), gain).T)
            bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, inputs) to (count, B, outputs), without an activation after the last layer."""
        x = inputs.expand(self.count, *inputs.shape)
        return self._layers(x, self.weights, self.biases, torch.baddbmm)

    def only(self, index: int, inputs: Tensor) -> Tensor:
        """(B, inputs) to (B, outputs) of one of the networks."""
        weights, biases = [w[index] for w in self.weights], [b[index] for b in self.biases]
        return self._layers(inputs, weights, biases, torch.addmm)

    def _layers(self, x: Tensor, weights, biases, product) -> Tensor:
        last = len(weights) - 1
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = product(bias, x, weight)
            if number < last:
                x = self.activation(x)
        return x


class ActorCritic(nn.Module):
    """Policy and value function of PPO and TRPO, in one stack: outputs of the first are the logits
    of the actions or the mean of a Gaussian, the first output of the second is the value.

    The standard deviation of the Gaussian is a parameter of its own for each component
    (https://arxiv.org/abs/1502.05477 appendix D).
    """

    def __init__(self, observation: int, action: int, discrete: bool, hidden: list[int]) -> None:
        super().__init__()
        self.action, self.discrete = action, discrete
        self.stack = Stack(2, [observation, *hidden, action], torch.tanh)
        # A policy that starts near uniform: https://arxiv.org/abs/2006.05990 section 3.2.
        self.stack.orthogonal([math.sqrt(2)] * len(hidden) + [0.01])
        with torch.no_grad():
            self.stack.weights[-1][1, :, :1] *= 100  # of the value: gain 1
        self.log_std = None if discrete else nn.Parameter(torch.zeros(action))

    def evaluate(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs of actions, entropies in nats and values, each (B,)."""
        heads = self.stack(observations)
        return *self.likelihood(heads[0], actions), heads[1, :, 0]

    def likelihood(self, policy: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Logprobs of actions and entropies in nats, (B,), under the outputs `policy` (B, A)."""
        if self.log_std is None:
            return ops.logprobs_and_entropy(policy, actions)
        return gaussian(policy, self.log_std, actions)

    def policy(self, observations: Tensor) -> Tensor:
        """Logits of the actions or mean of the Gaussian, (B, A)."""
        return self.stack.only(0, observations)

    def values(self, observations: Tensor) -> Tensor:
        return self.stack.only(1, observations)[:, 0]

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions: (B,) numbers from 0, or (B, A). noise: (B, A), of `draw_noise`, zeros for
        the most probable action."""
        policy = self.policy(observations)
        if self.log_std is None:
            return (policy + noise).argmax(-1)
        return torch.addcmul(policy, self.log_std.exp(), noise)

    def draw_noise(self, *shape: int) -> Tensor:
        """(*shape, A): Gumbel, whose largest sum with the logits is a draw, or normal."""
        noise = self.stack.weights[0].new_empty((*shape, self.action))
        return noise.exponential_().log_().neg_() if self.discrete else noise.normal_()


def gaussian(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies, nats, of a Gaussian with independent components.

    log p = sum of -z^2 / 2 - log_std - log(2 pi) / 2 with z = (actions - mean) / exp(log_std);
    H = sum of log_std + (1 + log(2 pi)) / 2.

    Args:
        mean, actions: (B, A). log_std: (A,).
    """
    scaled = (actions - mean) * (-log_std).exp()
    size, total = mean.shape[1], log_std.sum()
    logprobs = -0.5 * scaled.square().sum(1) - total - 0.5 * size * math.log(2 * math.pi)
    entropy = total + 0.5 * size * (1 + math.log(2 * math.pi))
    return logprobs, entropy.expand(len(mean))


class SquashedPolicy(nn.Module):
    """Policy of SAC: mean and log standard deviation of a Gaussian that tanh squashes."""

    def __init__(self, observation: int, action: int, hidden: list[int]) -> None:
        super().__init__()
        self.action = action
        self.stack = Stack(1, [observation, *hidden, 2 * action], torch.relu)

    def forward(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) in [-1, 1] and their logprobs (B,); noise (B, A), zeros: the mode."""
        mean, log_std = self.stack.only(0, observations).split(self.action, 1)
        return ops.squashed_gaussian(mean, log_std, noise)


class TwinQ(nn.Module):
    """Two Q-functions of observation and action."""

    def __init__(self, observation: int, action: int, hidden: list[int]) -> None:
        super().__init__()
        self.stack = Stack(2, [observation + action, *hidden, 1], torch.relu)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(2, B)."""
        return self.stack(torch.cat([observations, actions], 1))[:, :, 0]


class Value(nn.Module):
    """A value function of observations."""

    def __init__(self, observation: int, hidden: list[int]) -> None:
        super().__init__()
        self.stack = Stack(1, [observation, *hidden, 1], torch.relu)

    def forward(self, observations: Tensor) -> Tensor:
        """(B,)."""
        return self.stack.only(0, observations)[:, 0]
