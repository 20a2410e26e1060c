"""Losses of a reward model: a program for 256 pairs or a group of ranked scores, then one that
merges what they found.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.reward_model_loss import (
    PAIRS_PER_BLOCK,
    RankingLossArguments,
    RewardModelLossArguments,
)
from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.logistic import log_sigmoid
from warpo.kernels._triton.offsets import extent
from warpo.kernels._triton.sequences import (
    inverse_denominator,
    inverse_or_zero,
    merge_partials,
    poison_if,
    weighted,
)

GROUP_BLOCK = 16
# columns of the metrics vector, `kernels.reward_model_loss.REWARD_METRICS`
NUM_METRICS = tl.constexpr(7)
SCORES = 4
SCORE_MEAN = 5


@triton.jit
def _pair_loss(better, worse, margin, centering_coef):
    """Loss of a pair and its derivatives with respect to both scores."""
    log_probability, slope = log_sigmoid(better - worse - margin)
    both = better + worse
    pull = 2.0 * centering_coef * both
    return centering_coef * both * both - log_probability, pull - slope, pull + slope


@triton.jit
def _valid(mask_ptr, index, stride, inside):
    if mask_ptr is not None:
        inside &= tl.load(mask_ptr + index * stride, mask=inside, other=0) != 0
    return inside


@triton.jit
def _load(ptr, index, stride, keep):
    return tl.load(ptr + index * stride, mask=keep, other=0).to(tl.float32)


@triton.jit
def _store_partial(ptr, loss, pairs, correct, margin, scores, mean, m2):
    tl.store(ptr, loss)
    tl.store(ptr + 1, pairs)
    tl.store(ptr + 2, correct)
    tl.store(ptr + 3, margin)
    tl.store(ptr + 4, scores)
    tl.store(ptr + 5, mean)
    tl.store(ptr + 6, m2)


@kernel()
def _reward_model_loss_kernel(
    chosen_ptr,
    chosen_stride: tl.int64,
    rejected_ptr,
    rejected_stride: tl.int64,
    margins_ptr,
    margins_stride: tl.int64,
    mask_ptr,
    mask_stride: tl.int64,
    pairs: tl.int64,
    centering_coef: tl.float32,
    denominator: tl.float32,
    denominator_ptr,
    grad_chosen_ptr,
    grad_rejected_ptr,
    partials_ptr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    keep = _valid(mask_ptr, pair, mask_stride, pair < pairs)
    better = _load(chosen_ptr, pair, chosen_stride, keep)
    worse = _load(rejected_ptr, pair, rejected_stride, keep)
    margin = tl.zeros([BLOCK], tl.float32)
    if margins_ptr is not None:
        margin = _load(margins_ptr, pair, margins_stride, keep)
    weight = inverse_denominator(denominator, denominator_ptr)
    loss, grad_better, grad_worse = _pair_loss(better, worse, margin, centering_coef)
    if grad_chosen_ptr is not None:
        inside = pair < pairs
        grad_better, grad_worse = weighted(weight, grad_better), weighted(weight, grad_worse)
        tl.store(grad_chosen_ptr + pair, tl.where(keep, grad_better, 0.0), mask=inside)
        tl.store(grad_rejected_ptr + pair, tl.where(keep, grad_worse, 0.0), mask=inside)
    count = tl.sum(tl.where(keep, 1.0, 0.0))
    mean = tl.sum(better + worse) * inverse_or_zero(2.0 * count)
    above, below = better - mean, worse - mean
    _store_partial(
        partials_ptr + block * NUM_METRICS,
        weighted(weight, tl.sum(tl.where(keep, loss, 0.0))),
        count,
        tl.sum(tl.where(better > worse, 1.0, 0.0)),
        tl.sum(better - worse),
        2.0 * count,
        mean,
        tl.sum(tl.where(keep, above * above + below * below, 0.0)),
    )


@kernel()
def _ranking_loss_kernel(
    scores_ptr,
    scores_stride: tl.int64,
    ranks_ptr,
    ranks_stride: tl.int64,
    mask_ptr,
    mask_stride: tl.int64,
    cu_groups_ptr,
    num_scores: tl.int64,
    centering_coef: tl.float32,
    denominator: tl.float32,
    denominator_ptr,
    grad_ptr,
    partials_ptr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    groups = tl.num_programs(0)
    first, end, malformed = extent(cu_groups_ptr, 1, groups, group, num_scores, group < groups)
    size = end - first
    counts = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        member = start + tl.arange(0, BLOCK)
        keep = _valid(mask_ptr, first + member, mask_stride, member < size)
        counts += tl.where(keep, 1.0, 0.0)
        sums += _load(scores_ptr, first + member, scores_stride, keep)
    count = tl.sum(counts)
    mean = tl.sum(sums) * inverse_or_zero(count)
    weight = inverse_denominator(denominator, denominator_ptr)
    weight *= inverse_or_zero(0.5 * count * (count - 1.0))
    weight = poison_if(malformed, weight)

    zeros = tl.zeros([BLOCK], tl.float32)
    losses, pairs, correct, margins, m2 = zeros, zeros, zeros, zeros, zeros
    for start in range(0, size, BLOCK):
        member = start + tl.arange(0, BLOCK)
        keep = _valid(mask_ptr, first + member, mask_stride, member < size)
        own = _load(scores_ptr, first + member, scores_stride, keep)[:, None]
        rank = tl.load(ranks_ptr + (first + member) * ranks_stride, mask=keep, other=0)[:, None]
        gradient = zeros
        for other_start in range(0, size, BLOCK):
            other_member = other_start + tl.arange(0, BLOCK)
            others = first + other_member
            valid = _valid(mask_ptr, others, mask_stride, other_member < size)
            other = _load(scores_ptr, others, scores_stride, valid)[None, :]
            other_rank = tl.load(ranks_ptr + others * ranks_stride, mask=valid, other=0)[None, :]
            compared = keep[:, None] & valid[None, :] & (rank != other_rank)
            wins = rank < other_rank
            better, worse = tl.where(wins, own, other), tl.where(wins, other, own)
            loss, grad_better, grad_worse = _pair_loss(better, worse, 0.0, centering_coef)
            slope = tl.where(wins, grad_better, grad_worse)
            gradient += tl.sum(tl.where(compared, slope, 0.0), 1)
            won = compared & wins
            losses += tl.sum(tl.where(won, loss, 0.0), 1)
            pairs += tl.sum(tl.where(won, 1.0, 0.0), 1)
            correct += tl.sum(tl.where(won & (own > other), 1.0, 0.0), 1)
            margins += tl.sum(tl.where(won, own - other, 0.0), 1)
        if grad_ptr is not None:
            tl.store(
                grad_ptr + first + member,
                tl.where(keep, weighted(weight, gradient), 0.0),
                mask=member < size,
            )
        centred = _load(scores_ptr, first + member, scores_stride, keep) - mean
        m2 += tl.where(keep, centred * centred, 0.0)
    _store_partial(
        partials_ptr + group * NUM_METRICS,
        weighted(weight, tl.sum(losses)),
        tl.sum(pairs),
        tl.sum(correct),
        tl.sum(margins),
        count,
        mean,
        tl.sum(m2),
    )


def _vector(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if tensor is None else (tensor, tensor.stride(0))


def reward_model_loss(a: RewardModelLossArguments) -> None:
    blocks = a.partials.shape[0]
    with torch.cuda.device_of(a.chosen_scores):
        if blocks:
            _reward_model_loss_kernel[(blocks,)](
                *_vector(a.chosen_scores),
                *_vector(a.rejected_scores),
                *_vector(a.margins),
                *_vector(a.mask),
                a.pairs,
                float(a.centering_coef),
                a.denominator.number,
                a.denominator.tensor,
                a.grad_chosen,
                a.grad_rejected,
                a.partials,
                BLOCK=PAIRS_PER_BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
        merge_partials(a.partials, blocks, a.loss, a.metrics, SCORES, SCORE_MEAN)


def ranking_loss(a: RankingLossArguments) -> None:
    with torch.cuda.device_of(a.scores):
        if a.groups:
            _ranking_loss_kernel[(a.groups,)](
                *_vector(a.scores),
                *_vector(a.ranks),
                *_vector(a.mask),
                a.cu_groups,
                a.num_scores,
                float(a.centering_coef),
                a.denominator.number,
                a.denominator.tensor,
                a.grad_scores,
                a.partials,
                BLOCK=GROUP_BLOCK,
                num_warps=1,
                enable_fp_fusion=True,
            )
        merge_partials(a.partials, a.groups, a.loss, a.metrics, SCORES, SCORE_MEAN)
