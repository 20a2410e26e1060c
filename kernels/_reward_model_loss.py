"""Losses of a reward model: pairs (Bradley-Terry) and rankings of K completions; loss, gradient and
metrics in one pass.

    pair(b, w, m) = -log sigmoid(b - w - m) + centering_coef (b + w)^2
    pairs:    loss = 1 / denominator  sum_i pair(chosen_i, rejected_i, margin_i)
    rankings: loss = 1 / denominator  sum_g 1 / (K_g choose 2)  sum over pairs b ranked above w

Backward: d pair / d b = 2 centering_coef (b + w) - sigmoid(m + w - b), and d w likewise with +.

Sources: pairs with margins, Llama 2, https://arxiv.org/abs/2307.09288 eq. 2; rankings, InstructGPT,
https://arxiv.org/abs/2203.02155 eq. 1; centering, https://arxiv.org/abs/2312.09244 section 3.
"""

from collections.abc import Sequence
from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.reward_model_loss import (
    PAIRS_PER_BLOCK,
    RankingLossArguments,
    RewardModelLossArguments,
)
from warpo.kernels._checks import (
    FLOATS,
    as_int64,
    check_mask,
    check_no_grad,
    check_number,
    check_tensor,
)
from warpo.kernels._offsets import check_offsets, check_values
from warpo.kernels._registration import Operator
from warpo.kernels._sequences import (
    as_denominator,
    denominator_tensor,
    empty_results,
    merge_moments,
    scaled,
)

REWARD_METRICS = ("loss", "pairs", "correct", "margin", "scores", "score_mean", "score_m2")


class RewardModelLossInputs(NamedTuple):
    chosen_scores: Tensor
    rejected_scores: Tensor
    margins: Tensor | None
    mask: Tensor | None
    centering_coef: float
    denominator: DenominatorArguments
    with_gradient: bool
    backend: str


class RankingLossInputs(NamedTuple):
    scores: Tensor
    ranks: Tensor
    mask: Tensor | None
    cu_groups: Tensor
    centering_coef: float
    denominator: DenominatorArguments
    with_gradient: bool
    backend: str


class RewardModelLoss(NamedTuple):
    loss: Tensor
    metrics: Tensor


def reward_model_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margins: Tensor | None = None,
    mask: Tensor | None = None,
    centering_coef: float = 0.0,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> RewardModelLoss:
    """Bradley-Terry loss of pairs of scores.

    Args:
        chosen_scores: (B,) float32 | bfloat16 | float16, any stride. Differentiable.
        rejected_scores: like chosen_scores. Differentiable.
        margins: (B,) float: by how much the chosen score should be larger. A constant.
        mask: (B,) bool | uint8: pairs that count. The others are never read; their gradient is 0.
        centering_coef: weight of (chosen + rejected)^2, which holds the mean score at 0.
        denominator: what the sum over pairs is divided by, a number or a scalar tensor:
            pairs of the whole optimizer step, for gradients that do not depend on micro-batches.
            Not given: the pairs of this call. 0 gives loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to both scores.
        metrics: (7,) float32 in the order of REWARD_METRICS, on the device. `reward_model_metrics`
            reads it; `merge_reward_model_metrics` makes one of those of several micro-batches.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: 8 bytes per pair, and 28 bytes for 256 pairs.
    """
    check_tensor("chosen_scores", chosen_scores, FLOATS)
    if chosen_scores.dim() != 1:
        raise ValueError(f"chosen_scores must be (B,), got {tuple(chosen_scores.shape)}")
    check_tensor("rejected_scores", rejected_scores, FLOATS, chosen_scores.shape, chosen_scores)
    if margins is not None:
        check_tensor("margins", margins, FLOATS, chosen_scores.shape, chosen_scores)
        check_no_grad("margins", margins)
    scale = _check_options(chosen_scores, mask, centering_coef, denominator)
    name = dispatch.choose(chosen_scores, backend)
    if name == "reference":
        loss, metrics = reference.reward_model_loss(
            chosen_scores.float(),
            rejected_scores.float(),
            denominator_tensor(scale, chosen_scores),
            margins=None if margins is None else margins.float(),
            mask=mask,
            centering_coef=centering_coef,
        )
        return RewardModelLoss(loss, metrics)
    with_gradient = torch.is_grad_enabled() and (
        chosen_scores.requires_grad or rejected_scores.requires_grad
    )
    inputs = RewardModelLossInputs(
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        margins=margins,
        mask=mask,
        centering_coef=centering_coef,
        denominator=scale,
        with_gradient=with_gradient,
        backend=name,
    )
    return RewardModelLoss(*_pairs(inputs))


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor,
    *,
    mask: Tensor | None = None,
    centering_coef: float = 0.0,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> RewardModelLoss:
    """Loss of rankings: all pairs of completions to a prompt that differ in rank, a prompt weighing
    1.

    Args:
        scores: (N,) float32 | bfloat16 | float16, any stride. Differentiable.
        ranks: (N,) int64 | int32: lower is better. Completions of equal rank are not compared.
        cu_groups: (G + 1,) int32, not descending, within [0, N]: prompt g has the completions
            cu_groups[g] : cu_groups[g + 1]. On a GPU a malformed one makes the loss NaN.
        mask: (N,) bool | uint8: completions that count. The others are never read; their gradient
        is 0. centering_coef: weight of (score + other score)^2, which holds the mean score at 0.
        denominator: what the sum over prompts is divided by; not given: the prompts of this call.
            0 gives loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss, metrics: as of `reward_model_loss`. The loss of a pair is divided by K choose 2,
            with K the valid completions to the prompt, also where some have equal ranks.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: 4 bytes per score and 28 bytes per prompt.
    """
    check_tensor("scores", scores, FLOATS)
    if scores.dim() != 1:
        raise ValueError(f"scores must be (N,), got {tuple(scores.shape)}")
    ranks = as_int64("ranks", ranks, scores.shape, scores)
    groups = check_offsets("cu_groups", cu_groups, scores, shape="(G + 1,)")
    scale = _check_options(
        scores, mask, centering_coef, groups if denominator is None else denominator
    )
    name = dispatch.choose(scores, backend)
    if name == "reference":
        check_values("cu_groups", cu_groups, scores.numel(), "scores")
        return RewardModelLoss(
            *reference.ranking_loss(
                scores.float(),
                ranks,
                cu_groups,
                denominator_tensor(scale, scores),
                mask=mask,
                centering_coef=centering_coef,
            )
        )
    inputs = RankingLossInputs(
        scores=scores,
        ranks=ranks,
        mask=mask,
        cu_groups=cu_groups,
        centering_coef=centering_coef,
        denominator=scale,
        with_gradient=scores.requires_grad and torch.is_grad_enabled(),
        backend=name,
    )
    return RewardModelLoss(*_groups(inputs))


def reward_model_metrics(metrics: Tensor) -> dict[str, float]:
    """The metrics vector of either loss, read from the device once.

    Returns:
        loss/reward_model. reward_model/accuracy: share of pairs whose better completion has the
            larger score. reward_model/margin: mean over pairs of the difference. score/mean,
            score/std (population). All 0 without pairs.
    """
    row = dict(zip(REWARD_METRICS, metrics.tolist(), strict=True))
    pairs = max(row["pairs"], 1.0)
    return {
        "loss/reward_model": row["loss"],
        "reward_model/accuracy": row["correct"] / pairs,
        "reward_model/margin": row["margin"] / pairs,
        "score/mean": row["score_mean"],
        "score/std": (row["score_m2"] / max(row["scores"], 1.0)) ** 0.5,
    }


def merge_reward_model_metrics(metrics: Sequence[Tensor]) -> Tensor:
    """The metrics vectors of several micro-batches as one."""
    return merge_moments(
        metrics, REWARD_METRICS.index("scores"), REWARD_METRICS.index("score_mean")
    )


def _check_options(
    scores: Tensor,
    mask: Tensor | None,
    centering_coef: float,
    denominator: float | Tensor | None,
) -> DenominatorArguments:
    check_mask("mask", mask, scores.shape, scores)
    check_number("centering_coef", centering_coef)
    if not centering_coef >= 0:
        raise ValueError(f"centering_coef must be >= 0, got {centering_coef}")
    if denominator is not None:
        return as_denominator(denominator, scores)
    if mask is not None:
        return DenominatorArguments(0.0, mask.sum(dtype=torch.float32))
    return as_denominator(scores.numel(), scores)


def _forward_pairs(inputs: RewardModelLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    pairs = inputs.chosen_scores.shape[0]
    loss, metrics, partials = _allocate(
        inputs.denominator, inputs.chosen_scores, _count_blocks(pairs)
    )
    gradients = _allocate_gradients(inputs, partials)
    grad_chosen, grad_rejected = gradients.unbind() if inputs.with_gradient else (None, None)
    arguments = RewardModelLossArguments(
        pairs=pairs,
        chosen_scores=inputs.chosen_scores,
        rejected_scores=inputs.rejected_scores,
        margins=inputs.margins,
        mask=inputs.mask,
        centering_coef=inputs.centering_coef,
        denominator=inputs.denominator,
        grad_chosen=grad_chosen,
        grad_rejected=grad_rejected,
        partials=partials,
        loss=loss,
        metrics=metrics,
    )
    dispatch.load(inputs.backend).reward_model_loss(arguments)
    return loss, metrics, gradients


def _count_blocks(pairs: int) -> int:
    return (pairs + PAIRS_PER_BLOCK - 1) // PAIRS_PER_BLOCK


def _allocate(
    denominator: DenominatorArguments, like: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics, partials."""
    loss, metrics = empty_results(denominator, like, len(REWARD_METRICS))
    return loss, metrics, metrics.new_empty(blocks, len(REWARD_METRICS))


def _allocate_gradients(inputs: RewardModelLossInputs, partials: Tensor) -> Tensor:
    """(2, pairs). Where none are wanted the partials, as a tensor of no elements takes 0.8 us."""
    if not inputs.with_gradient:
        return partials
    return partials.new_empty(2, inputs.chosen_scores.shape[0])


def _fake_pairs(inputs: RewardModelLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _count_blocks(inputs.chosen_scores.shape[0])
    loss, metrics, partials = _allocate(inputs.denominator, inputs.chosen_scores, blocks)
    return loss, metrics, _allocate_gradients(inputs, partials)


def _save_pairs(ctx: Any, inputs: RewardModelLossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = (inputs.chosen_scores.dtype, inputs.rejected_scores.dtype)
    ctx.with_gradient = inputs.with_gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _differentiate_pairs(ctx: Any, grad_loss: Tensor | None, *_: object, scale: Any = mul) -> Any:
    if grad_loss is None or not ctx.with_gradient:
        return (None, None)
    (gradients,) = ctx.saved_tensors
    chosen, rejected = scale(gradients, grad_loss).unbind()
    return (chosen.to(ctx.dtypes[0]), rejected.to(ctx.dtypes[1]))


_pairs = Operator(
    "reward_model_loss",
    _forward_pairs,
    _fake_pairs,
    _save_pairs,
    _differentiate_pairs,
    differentiable=2,
    differentiate_eager=partial(_differentiate_pairs, scale=scaled),
    returned=2,
)


def _forward_groups(inputs: RankingLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    scores, cu_groups = inputs.scores, inputs.cu_groups
    check_values("cu_groups", cu_groups, scores.numel(), "scores")
    groups = cu_groups.numel() - 1
    loss, metrics, partials = _allocate(inputs.denominator, scores, groups)
    # zeros: of scores that belong to no group
    gradient = metrics.new_zeros(scores.shape[0] if inputs.with_gradient else 0)
    arguments = RankingLossArguments(
        groups=groups,
        num_scores=scores.numel(),
        scores=scores,
        ranks=inputs.ranks,
        mask=inputs.mask,
        cu_groups=cu_groups,
        centering_coef=inputs.centering_coef,
        denominator=inputs.denominator,
        grad_scores=gradient if inputs.with_gradient else None,
        partials=partials,
        loss=loss,
        metrics=metrics,
    )
    dispatch.load(inputs.backend).ranking_loss(arguments)
    return loss, metrics, gradient


def _fake_groups(inputs: RankingLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    loss, metrics, _ = _allocate(inputs.denominator, inputs.scores, inputs.cu_groups.shape[0] - 1)
    size = inputs.scores.shape[0] if inputs.with_gradient else 0
    return loss, metrics, metrics.new_empty(size)


def _save_groups(ctx: Any, inputs: RankingLossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.with_gradient = inputs.scores.dtype, inputs.with_gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _differentiate_groups(ctx: Any, grad_loss: Tensor | None, *_: object, scale: Any = mul) -> Any:
    if grad_loss is None or not ctx.with_gradient:
        return (None,)
    (gradient,) = ctx.saved_tensors
    return (scale(gradient, grad_loss).to(ctx.dtype),)


_groups = Operator(
    "ranking_loss",
    _forward_groups,
    _fake_groups,
    _save_groups,
    _differentiate_groups,
    differentiable=1,
    differentiate_eager=partial(_differentiate_groups, scale=scaled),
    returned=2,
)
