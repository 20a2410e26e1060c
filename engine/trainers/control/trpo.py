"""Trust region policy optimisation, https://arxiv.org/abs/1502.05477: eq. 14, solved as in its
appendix C.

    maximise  L = mean of ratio A   subject to   mean of KL(old(s), new(s)) <= max_kl

F is the Hessian of that mean KL at the old parameters, g the gradient of L, and x the solution of
(F + damping) x = g by conjugate gradient. The step sqrt(2 max_kl / x' (F + damping) x) x shrinks
until L rises and the KL is within max_kl. The value function learns by Adam, with the returns that
PPO's has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.columns import Column
from warpo.engine.run.plot import Panel
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.networks import ActorCritic
from warpo.engine.trainers.control.on_policy import OnPolicyLearner
from warpo.engine.trainers.control.rollouts import Samples
from warpo.kernels import ops


class TrpoLearner(OnPolicyLearner):
    """A step of the policy within the trust region, and the value's updates.

    A vector of parameters holds those of the value function too, in whose place gradients and
    steps of the policy are 0.
    """

    columns = (
        Column("step", "step", "step", "d"),
        Column("episode/return", "return", "return", ".1f"),
        Column("eval/return", "eval", "eval return", ".1f"),
        Column("loss/value", "value", "value loss", ".2e"),
        Column("value/explained_variance", "expl", "explained", ".3f"),
        Column("kl/mean", "KL", "KL", ".2e"),
        Column("line_search/length", "length", "length of the step", ".3f"),
        Column("entropy/mean", "entropy", "entropy", ".3f"),
        Column("perf/env_steps_per_s", "steps/s", "steps/s", ".0f"),
    )
    panels = (
        Panel("return of an episode", (("episode/return", "train"), ("eval/return", "eval"))),
        Panel("value loss", (("loss/value", "train"),)),
        Panel("KL of the old policy to the new (nats)", (("kl/mean", "train"),), (0, None)),
        Panel("share of the longest step", (("line_search/length", "train"),), (0, None)),
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
        super().__init__(config, spaces, environments, device, config.trpo)

    def _update(self, samples: Samples) -> dict[str, float]:
        return self._update_policy(samples) | self._update_value(samples)

    def _update_policy(self, samples: Samples) -> dict[str, float]:
        """One step within the trust region."""
        trpo, network = self._config.trpo, self.network
        if trpo.normalize_advantages:
            samples = samples._replace(advantages=ops.whiten(samples.advantages[None])[0])
        old, entropy = self._surrogate(samples)
        gradient = _flat(torch.autograd.grad(old, list(network.parameters())))
        fisher = fisher_product(network, samples.observations)

        def damped(vector: Tensor) -> Tensor:
            return fisher(vector) + trpo.cg_damping * vector

        direction = conjugate_gradient(damped, gradient, trpo.cg_iterations)
        curvature = (direction @ damped(direction)).item()
        # no advantage differs from 0, or rounding of a flat KL
        scale = math.sqrt(2 * trpo.max_kl / curvature) if curvature > 0 else 0.0
        length, surrogate, kl = self._line_search(samples, old.item(), scale * direction)
        return {
            "loss/policy": -surrogate,
            "entropy/mean": entropy.mean().item(),
            "kl/mean": kl,
            "line_search/length": length,
            "grad_norm": gradient.norm().item(),
        }

    def _surrogate(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """L, and the entropies (B,)."""
        policy = self.network.policy(samples.observations)
        logprobs, entropy = self.network.likelihood(policy, samples.actions)
        ratio = (logprobs - samples.old_logprobs).exp()
        return (ratio * samples.advantages).mean(), entropy.detach()

    @torch.no_grad()
    def _line_search(
        self, samples: Samples, old: float, step: Tensor
    ) -> tuple[float, float, float]:
        """Take the longest of the tried shares of a step that raises L within max_kl.

        Returns:
            The share, 0 where none does; L and the KL behind it.
        """
        trpo, network = self._config.trpo, self.network
        parameters = list(network.parameters())
        start = _flat(parameters)
        policy, log_std = network.policy(samples.observations), _copy(network.log_std)
        for attempt in range(trpo.line_search_iterations):
            share = trpo.line_search_shrink**attempt
            _assign(parameters, start + share * step)
            surrogate = self._surrogate(samples)[0].item()
            new = network.policy(samples.observations)
            kl = mean_kl(policy, log_std, new, network.log_std).item()
            if surrogate > old and kl <= trpo.max_kl:
                return share, surrogate, kl
        _assign(parameters, start)
        return 0.0, old, 0.0

    def _update_value(self, samples: Samples) -> dict[str, float]:
        """value_epochs x minibatches optimizer steps on half the mean squared error."""
        trpo, count = self._config.trpo, len(samples.returns)
        results = []
        for _ in range(trpo.value_epochs):
            order = torch.randperm(count, device=self._device)
            for chosen in order.split(trpo.minibatch_size):
                values = self.network.values(samples.observations[chosen])
                old, returns = samples.old_values[chosen], samples.returns[chosen]
                value = ops.value_loss(values[None], old[None], returns[None], clip_range=None)
                self._optimizer.zero_grad()
                value.loss.backward()
                self._optimizer.step()
                results.append(value.metrics)
        metrics = ops.value_metrics(ops.merge_value_metrics(results))
        return {
            "loss/value": metrics["loss/value"] / len(results),
            "value/explained_variance": metrics["value/explained_variance"],
            "value/mean": metrics["value/mean"],
        }


def mean_kl(
    old: Tensor, old_log_std: Tensor | None, new: Tensor, new_log_std: Tensor | None
) -> Tensor:
    """Mean over the rows of KL(old, new), nats, of policies by their outputs (B, A).

    Discrete: sum of p (log p - log q). Gaussian, of deviations s and t:
    sum of log(t / s) + (s^2 + (difference of the means)^2) / (2 t^2) - 1/2.
    """
    if old_log_std is None or new_log_std is None:
        logp, logq = old.log_softmax(-1), new.log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1).mean()
    variance = (2 * old_log_std).exp() + (new - old).square()
    terms = new_log_std - old_log_std + 0.5 * variance * (-2 * new_log_std).exp() - 0.5
    return terms.sum(-1).mean()


def fisher_product(network: ActorCritic, observations: Tensor) -> Callable[[Tensor], Tensor]:
    """F v of a flat vector v, F the Hessian of the mean KL(old, new) where new is old."""
    parameters = list(network.parameters())
    policy = network.policy(observations)
    kl = mean_kl(policy.detach(), _copy(network.log_std), policy, network.log_std)
    gradient = _flat(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(gradient @ vector, parameters, retain_graph=True))

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int
) -> Tensor:
    """x with product(x) = target, of a positive definite product, after `iterations` steps from 0
    or once the square of the residual is 1e-10 of the target's, or rounding leaves no curvature.
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, square = target.clone(), target @ target
    enough = 1e-10 * square
    for _ in range(iterations):
        if square <= enough:
            break
        along = product(direction)
        curvature = direction @ along
        if curvature <= 0:
            break
        rate = square / curvature
        x += rate * direction
        residual -= rate * along
        before, square = square, residual @ residual
        direction = residual + (square / before) * direction
    return x


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _copy(log_std: Tensor | None) -> Tensor | None:
    return None if log_std is None else log_std.detach().clone()


def _assign(parameters: list[torch.nn.Parameter], vector: Tensor) -> None:
    pieces = vector.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))
