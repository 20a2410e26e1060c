"""Gradients of one optimizer step from given data, micro-batch by micro-batch.

Every function divides by what it counts over all micro-batches, so neither loss nor gradient
depends on how examples are split. Gradients are added to those of the parameters; under
`torch.no_grad` only the metrics are computed, which is how held-out data is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from warpo.engine.models.batch import Batch
from warpo.engine.models.model import token_logprobs
from warpo.engine.models.scalar import token_scores
from warpo.engine.models.score import score
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.kernels import ops
from warpo.kernels.preferences import Preference

STEP_METRICS = ("loss", "steps", "correct", "right", "right_score", "wrong", "wrong_score")


def supervised_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    coef: float = 1.0,
    aggregation: str = "token-mean",
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """loss = coef / D * sum over the completion tokens of all batches of -logp.

    With coef = gamma it is the pre-training term of InstructGPT's PPO-ptx,
    https://arxiv.org/abs/2203.02155 eq. 2.

    Args:
        aggregation: D is the number of those tokens, "token-mean", or of the sequences,
            "sequence-mean-token-sum", as in the paper.

    Returns:
        The loss, () float32 on the device.
    """
    counts = (b.num_trained if aggregation == "token-mean" else b.num_sequences for b in batches)
    total = ranks.sum(sum(counts))
    losses = [
        _backward(-coef / total * token_logprobs(model, batch, 1.0).logprobs.sum())
        for batch in batches
    ]
    return torch.stack(ranks.gather(losses)).sum()


def preference_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    preference: Preference,
    temperature: float = 1.0,
    *,
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """Loss of pairs, `ops.preference_loss`, as a mean over the pairs of all batches.

    Args:
        batches: of 2 B sequences each: B chosen completions, then the B rejected ones in the same
            order. ref_logprobs is needed where the preference has a reference.
        temperature: of the distribution whose logprobs count, and of which ref_logprobs are.

    Returns:
        The vector of `ops.preference_loss`, summed over the batches.
    """
    pairs = ranks.sum(sum(batch.num_sequences // 2 for batch in batches))
    metrics = []
    for batch in batches:
        logprobs = token_logprobs(model, batch, temperature).logprobs
        half, starts = batch.num_sequences // 2, batch.cu_seqlens
        result = ops.preference_loss(
            logprobs,
            logprobs,
            batch.ref_logprobs,
            batch.ref_logprobs,
            loss=preference,
            chosen_cu_seqlens=starts[: half + 1],
            rejected_cu_seqlens=starts[half:],
            denominator=pairs,
        )
        _backward(result.loss)
        metrics.append(result.metrics)
    return torch.stack(ranks.gather(metrics)).sum(0)


def kto_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    unrelated: Sequence[Batch],
    desirable: Sequence[Tensor],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """KTO, `ops.kto_loss`, as a mean over the examples of all batches.

    Args:
        batches: completions with ref_logprobs.
        unrelated: the same prompts with completions of other prompts, with ref_logprobs. Their mean
            log ratio, cut at 0, is the reference point.
        desirable: for each batch (B,) bool.

    Returns:
        The vector of `ops.kto_loss`, summed over the batches.
    """
    examples = ranks.sum(sum(batch.num_sequences for batch in batches))
    ratios = [(score(model, batch, 1.0) - _reference(batch)).sum() for batch in unrelated]
    kl = (ranks.sum(torch.stack(ratios).sum()) / examples).clamp(min=0)
    metrics = []
    for batch, labels in zip(batches, desirable, strict=True):
        result = ops.kto_loss(
            token_logprobs(model, batch, 1.0).logprobs,
            _reference(batch),
            labels,
            kl=kl,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            cu_seqlens=batch.cu_seqlens,
            denominator=examples,
        )
        _backward(result.loss)
        metrics.append(result.metrics)
    return torch.stack(ranks.gather(metrics)).sum(0)


def pair_gradients(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    margins: Sequence[Tensor],
    *,
    centering_coef: float = 0.0,
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """Bradley-Terry, `ops.reward_model_loss`, as a mean over the pairs of all batches.

    Args:
        batches: as of `preference_gradients`, without ref_logprobs.
        margins: for each batch (B,) float32.

    Returns:
        The vector of `ops.reward_model_loss` of all batches.
    """
    pairs = ranks.sum(sum(batch.num_sequences // 2 for batch in batches))
    metrics = []
    for batch, margin in zip(batches, margins, strict=True):
        chosen, rejected = sequence_scores(model, batch).chunk(2)
        result = ops.reward_model_loss(
            chosen, rejected, margins=margin, centering_coef=centering_coef, denominator=pairs
        )
        _backward(result.loss)
        metrics.append(result.metrics)
    return ops.merge_reward_model_metrics(ranks.gather(metrics))


def ranking_gradients(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    groups: Sequence[Tensor],
    *,
    centering_coef: float = 0.0,
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """All pairs of each ranking, `ops.ranking_loss`, as a mean over the rankings of all batches.

    Args:
        batches: the completions of each ranking from the best to the worst, ranking by ranking.
        groups: for each batch (G + 1,) int32: where among its sequences each ranking starts.

    Returns:
        The vector of `ops.ranking_loss` of all batches.
    """
    rankings = ranks.sum(sum(starts.numel() - 1 for starts in groups))
    metrics = []
    for batch, starts in zip(batches, groups, strict=True):
        scores = sequence_scores(model, batch)
        result = ops.ranking_loss(
            scores,
            torch.arange(scores.numel(), device=scores.device),
            starts,
            centering_coef=centering_coef,
            denominator=rankings,
        )
        _backward(result.loss)
        metrics.append(result.metrics)
    return ops.merge_reward_model_metrics(ranks.gather(metrics))


def step_gradients(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    ends: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """Cross-entropy of the score at the last token of each step, as a mean over all steps.

        loss = 1 / K sum over the K steps of -label log sigmoid(s) - (1 - label) log sigmoid(-s)

    as in https://arxiv.org/abs/2305.20050 section 2, and Math-Shepherd, which has soft labels too,
    https://arxiv.org/abs/2312.08935 eq. 2.

    Args:
        ends: for each batch (K,) int64: index among its tokens of the last one of each step.
        labels: for each batch (K,) float32 in [0, 1].

    Returns:
        (7,) float32 in the order of STEP_METRICS: the loss, and sums over steps. A step is right
        where its label is above 1/2, and correct where the sign of its score says the same.
    """
    steps = ranks.sum(sum(label.numel() for label in labels))
    metrics = []
    for batch, index, label in zip(batches, ends, labels, strict=True):
        scores = token_scores(model, batch, index)
        loss = F.binary_cross_entropy_with_logits(scores, label, reduction="sum") / steps
        _backward(loss)
        right, given = label > 0.5, scores.detach()
        sums = (
            torch.ones_like(label),
            (given > 0) == right,
            right,
            given.where(right, 0),
            ~right,
            given.where(~right, 0),
        )
        metrics.append(torch.stack([loss.detach(), *(value.float().sum() for value in sums)]))
    return torch.stack(ranks.gather(metrics)).sum(0)


def sequence_scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Scores (B,) float32 at the last token of each sequence: rewards of its completion."""
    return token_scores(model, batch, batch.gather_index[:, -1])


def _backward(loss: Tensor) -> Tensor:
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def _reference(batch: Batch) -> Tensor:
    assert batch.ref_logprobs is not None
    return batch.ref_logprobs
