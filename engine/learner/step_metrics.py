"""Metrics of one row, from the reports of a step's optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from warpo.engine.learner.optimizer import update_metrics
from warpo.engine.learner.step import StepResult
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.types import Metrics
from warpo.kernels import ops


def step_metrics(results: Sequence[StepResult], ranks: Ranks = ONE_RANK) -> Metrics:
    """Losses, gradient norm and shares as means over the optimizer steps of a step."""
    metrics: Metrics = {}
    policy = [result.policy for result in results if result.policy is not None]
    if policy:
        metrics |= _policy(ops.policy_metrics(ops.sum_metrics(policy)), len(policy))
    pairs = [result.pairs for result in results if result.pairs is not None]
    if pairs:
        metrics |= ops.preference_metrics(torch.stack(pairs).sum(0))
        metrics["loss/preference"] /= len(pairs)
    values = [result.values for result in results if result.values is not None]
    if values:
        metrics |= ops.value_metrics(ops.merge_value_metrics(values))
        metrics["loss/value"] /= len(values)
    right = [result.right for result in results if result.right is not None]
    if right:
        metrics["loss/right_nll"] = torch.stack(right).mean().item()
    penalty = [result.penalty for result in results if result.penalty is not None]
    if penalty:
        metrics["loss/covariance_kl"] = torch.stack(penalty).mean().item()
    covariance = [result.covariance for result in results if result.covariance is not None]
    if covariance:
        mean, share = torch.stack(covariance).mean(0).tolist()
        metrics |= {"covariance/mean": mean, "covariance/chosen_frac": share}
    pretraining = [result.pretraining for result in results if result.pretraining is not None]
    if pretraining:
        metrics["loss/pretraining"] = torch.stack(pretraining).mean().item()
    updates = [result.update for result in results if result.update is not None]
    if not updates:
        return metrics
    metrics["grad_norm"] = torch.stack([update.grad_norm for update in updates]).mean().item()
    return metrics | update_metrics(ranks.gather(updates))


def _policy(metrics: Metrics, updates: int) -> Metrics:
    for name in ("loss/policy", "loss/kl", "loss/entropy"):
        metrics[name] /= updates
    clipped = metrics["ratio/clip_frac_low"] + metrics["ratio/clip_frac_high"]
    return metrics | {"ratio/clip_frac": clipped}
