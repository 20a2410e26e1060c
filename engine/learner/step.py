"""The gradient of one optimizer step of the policy, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from warpo.engine.learner.optimizer import WeightUpdate
from warpo.engine.models.batch import Batch
from warpo.engine.models.model import predict
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.kernels import ops
from warpo.kernels.objectives import Objective

if TYPE_CHECKING:
    from warpo.engine.learner.critic import Critic


class StepResult(NamedTuple):
    """Report of an optimizer step, on the device; None for a part that it does not have.

    Attributes:
        policy: the vector of `ops.policy_loss`, summed over micro-batches.
        pairs: the vector of `ops.preference_loss`.
        values: the vector of `ops.value_loss`.
        right: the loss of right completions, times its coefficient.
        penalty: the KL of the tokens that pay one, times its coefficient.
        covariance: the report of `by_covariance`.
        pretraining: the supervised loss, times its coefficient.
        logprobs: (M,) of the tokens of the micro-batches, in their order, before the step.
        update: effect of the step on the policy's weights.
    """

    policy: Tensor | None = None
    pairs: Tensor | None = None
    values: Tensor | None = None
    right: Tensor | None = None
    penalty: Tensor | None = None
    covariance: Tensor | None = None
    pretraining: Tensor | None = None
    logprobs: Tensor | None = None
    update: WeightUpdate | None = None


def denominator(
    batches: Sequence[Batch], aggregation: str, max_new_tokens: int, ranks: Ranks = ONE_RANK
) -> float:
    """Return the divisor of an optimizer step's loss, counted over all of its micro-batches."""
    if aggregation == "token-mean":
        return ranks.sum(sum(batch.num_trained for batch in batches))
    sequences = ranks.sum(sum(batch.num_sequences for batch in batches))
    if aggregation == "sequence-mean-token-sum-norm":
        return sequences * max_new_tokens
    return sequences


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    temperature: float,
    max_new_tokens: int,
    kl_coef: float | None = None,
    causal_gamma: float | None = None,
    critic: Critic | None = None,
    right_nll_coef: float = 0.0,
    penalty_coef: float = 0.0,
    ranks: Ranks = ONE_RANK,
) -> StepResult:
    """Add the gradient of one optimizer step to that of the parameters, micro-batch by micro-batch.

    loss = sum over the micro-batches of sum_t w_t loss_t / denominator, where the denominator is
    that of the whole step: loss and gradient do not depend on how the rollouts are split into
    micro-batches.

    Args:
        kl_coef: instead of the objective's.
        causal_gamma: the advantages are rewards of tokens, of which `ops.off_policy_returns` makes
            advantages with this discount.
        critic: one that shares the model's trunk: its loss is added, times its coef.
        right_nll_coef: weight of the mean of -logp over the tokens of right completions in all
            micro-batches, which is added; of VAPO, https://arxiv.org/abs/2504.05118.
        penalty_coef: weight of |logp - old| of the tokens that `Batch.penalized` marks, which is
            added to their losses; of KL-Cov, https://arxiv.org/abs/2505.22617 eq. 14.

    Returns:
        The parts policy, values, penalty and right, summed over the micro-batches, and logprobs.
    """
    total = denominator(batches, objective.aggregation, max_new_tokens, ranks)
    value_total = 0.0 if critic is None else critic.denominator(batches)
    right_weight = right_nll_coef and right_nll_coef / _count_right(batches, ranks)
    logprobs, metrics, value_metrics, right_losses, penalties = [], [], [], [], []
    for batch in batches:
        loss, batch_metrics, current, values = _policy_loss(
            model,
            batch,
            objective,
            value_head=None if critic is None else critic.value_head,
            temperature=temperature,
            causal_gamma=causal_gamma,
            keep_logprobs=batch.penalized is not None or right_nll_coef != 0,
            kl_coef=kl_coef,
            denominator=total,
        )
        if critic is not None and values is not None:
            value_loss, batch_values = critic.loss(values, batch, value_total)
            loss = loss + critic.coef * value_loss
            value_metrics.append(batch_values)
        if batch.penalized is not None:
            penalty = penalty_coef * _penalty(current, batch, objective, total)
            loss = loss + penalty
            penalties.append(penalty.detach())
        if right_nll_coef:
            assert batch.right is not None
            right_loss = -right_weight * current.where(batch.right, 0).sum()
            loss = loss + right_loss
            right_losses.append(right_loss.detach())
        loss.backward()
        logprobs.append(current.detach())
        metrics.append(batch_metrics)
    return StepResult(
        policy=ops.sum_metrics(ranks.gather(metrics)),
        values=ops.merge_value_metrics(ranks.gather(value_metrics)) if value_metrics else None,
        penalty=torch.stack(ranks.gather(penalties)).sum() if penalties else None,
        right=torch.stack(ranks.gather(right_losses)).sum() if right_losses else None,
        logprobs=torch.cat(logprobs),
    )


def _policy_loss(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    *,
    value_head: nn.Module | None,
    temperature: float,
    causal_gamma: float | None,
    keep_logprobs: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss and metrics of `ops.policy_loss`; the logprobs, which are differentiable where they are
    kept for other losses; and the values of a value head.

    Loss and gradient take one pass over the head where only the loss reads the logprobs.
    """
    predictions, values = predict(model, batch, value_head)
    advantages = batch.advantages
    assert advantages is not None
    options |= {
        "cu_seqlens": batch.cu_seqlens,
        "ref_logprobs": batch.ref_logprobs,
        "sampler_logprobs": batch.sampler_logprobs,
    }
    if causal_gamma is None and not keep_logprobs:
        found = predictions.policy_loss(
            batch.targets,
            advantages,
            objective,
            old_logprobs=batch.old_logprobs,
            temperature=temperature,
            **options,
        )
        return found.loss, found.metrics, found.logprobs, values
    current = predictions.logprobs(batch.targets, temperature)
    if causal_gamma is not None:
        assert batch.old_logprobs is not None
        advantages = ops.off_policy_returns(
            advantages,
            current.logprobs.detach(),
            batch.old_logprobs,
            gamma=causal_gamma,
            cu_seqlens=batch.cu_seqlens,
        )
    loss, metrics = ops.policy_loss(
        current.logprobs,
        batch.old_logprobs,
        advantages,
        objective,
        # only for the metrics it needs no gradient
        entropy=current.entropy if objective.entropy_coef else current.entropy.detach(),
        **options,
    )
    return loss, metrics, current.logprobs, values


def _penalty(logprobs: Tensor, batch: Batch, objective: Objective, total: float) -> Tensor:
    """|logp - old| of the marked tokens, aggregated as the losses of tokens are."""
    assert batch.old_logprobs is not None and batch.penalized is not None
    distance = (logprobs - batch.old_logprobs).abs().where(batch.penalized, 0)
    return ops.aggregate(
        distance, objective.aggregation, cu_seqlens=batch.cu_seqlens, denominator=total
    )


def _count_right(batches: Sequence[Batch], ranks: Ranks) -> Tensor:
    """() int64 on the device, at least 1: tokens of right completions."""
    counts = [batch.right.sum() for batch in batches if batch.right is not None]
    return ranks.sum(torch.stack(counts).sum()).clamp(min=1)
