"""Proximal policy optimisation with N environments and T steps: algorithm 1 of
https://arxiv.org/abs/1707.06347.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from warpo.engine.config.control import ControlConfig
from warpo.engine.run.columns import Column
from warpo.engine.run.plot import Panel
from warpo.engine.trainers.control.environments import Environments, Spaces
from warpo.engine.trainers.control.on_policy import OnPolicyLearner
from warpo.engine.trainers.control.rollouts import Samples
from warpo.kernels import ops


class PpoLearner(OnPolicyLearner):
    """Epochs of minibatches on the clipped surrogate."""

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
        super().__init__(config, spaces, environments, device, config.ppo)
        ppo = config.ppo
        self._objective = ops.get_objective("ppo").replace(
            clip_low=ppo.clip_range, clip_high=ppo.clip_range, entropy_coef=ppo.entropy_coef
        )

    def _update(self, samples: Samples) -> dict[str, float]:
        """epochs x minibatches optimizer steps, and their mean metrics."""
        ppo, count = self._config.ppo, len(samples.returns)
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
