"""Losses of preferences, of pairs of completions or of completions with a verdict: one launch sums
the tokens of all completions in slices, a second one finds the losses and gives every token its
gradient, and a third one merges what they found.

The formulas are those of `csrc/math/preference_loss.h`.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.preference_loss import KtoLossArguments, PreferenceLossArguments
from warpo.kernels._triton.completions import (
    BLOCK,
    WARPS,
    count_parts,
    destination,
    slices_of,
    store_gradient,
    sum_completion,
    sum_slices,
)
from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.logistic import expm1, log1mexp, log_sigmoid
from warpo.kernels._triton.sequences import (
    inverse_denominator,
    inverse_or_zero,
    merge_partials,
    poison_if,
    weighted,
)

# columns of the metrics vectors, `kernels.preference_loss`
NUM_METRICS = tl.constexpr(8)
NUM_KTO_METRICS = tl.constexpr(7)
HINGE = tl.constexpr(1)
SQUARE = tl.constexpr(2)


@triton.jit
def _log_odds(x):
    """Value and derivative; x counts as at most -2^-24, without a gradient where that holds."""
    bounded = x > -5.9604645e-8
    below = tl.where(bounded, -5.9604645e-8, x)
    return below - log1mexp(below), tl.where(bounded, 0.0, -1.0 / expm1(below))


@triton.jit
def _link_loss(
    difference,
    beta,
    margin,
    positive_weight,
    negative_weight,
    LINK: tl.constexpr,
    ODDS: tl.constexpr,
):
    """Value and derivative."""
    if LINK == SQUARE:
        error = difference - margin
        loss = error * error
        slope = 2.0 * error
    elif LINK == HINGE:
        missing = margin - beta * difference
        # a NaN passes
        satisfied = missing <= 0
        loss = tl.where(satisfied, 0.0, missing)
        slope = tl.where(satisfied, 0.0, tl.where(missing > 0, -beta, missing))
    else:
        scale = 1.0 if ODDS else beta
        x = scale * difference - margin
        log_probability, wrong = log_sigmoid(x)
        loss = negative_weight * (x - log_probability) - positive_weight * log_probability
        slope = scale * (negative_weight * (1.0 - wrong) - positive_weight * wrong)
    return loss, slope


@kernel()
def _preference_loss_kernel(
    chosen_steps: tl.int64,
    chosen_cu_ptr,
    chosen_mask_ptr,
    chosen_mask_stride_b: tl.int64,
    chosen_mask_stride_t: tl.int64,
    grad_chosen_ptr,
    rejected_steps: tl.int64,
    rejected_cu_ptr,
    rejected_mask_ptr,
    rejected_mask_stride_b: tl.int64,
    rejected_mask_stride_t: tl.int64,
    grad_rejected_ptr,
    beta: tl.float32,
    margin: tl.float32,
    positive_weight: tl.float32,
    negative_weight: tl.float32,
    nll_coef: tl.float32,
    denominator: tl.float32,
    denominator_ptr,
    partials_ptr,
    LINK: tl.constexpr,
    LENGTH_NORMALISE: tl.constexpr,
    ODDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    n, logp, x, chosen_malformed = sum_completion(
        pair, chosen_steps, chosen_cu_ptr, slices_of(partials_ptr, NUM_METRICS, pair, 0), BLOCK
    )
    m, other_logp, y, rejected_malformed = sum_completion(
        pair, rejected_steps, rejected_cu_ptr, slices_of(partials_ptr, NUM_METRICS, pair, 1), BLOCK
    )
    counts = (n > 0) & (m > 0)
    chosen_share, rejected_share = 1.0, 1.0
    if LENGTH_NORMALISE:
        chosen_share, rejected_share = inverse_or_zero(n), inverse_or_zero(m)
        x *= chosen_share
        y *= rejected_share
    better, better_slope, worse, worse_slope = x, 1.0, y, 1.0
    if ODDS:
        better, better_slope = _log_odds(x)
        worse, worse_slope = _log_odds(y)
    loss, slope = _link_loss(
        better - worse, beta, margin, positive_weight, negative_weight, LINK, ODDS
    )
    nll = -logp * inverse_or_zero(n)
    loss = tl.where(nll_coef != 0, loss + nll_coef * nll, loss)
    weight = inverse_denominator(denominator, denominator_ptr)
    weight = poison_if(chosen_malformed | rejected_malformed, weight)
    if grad_chosen_ptr is not None:
        gradient = slope * better_slope * chosen_share - nll_coef * inverse_or_zero(n)
        store_gradient(
            pair,
            chosen_steps,
            chosen_cu_ptr,
            chosen_mask_ptr,
            chosen_mask_stride_b,
            chosen_mask_stride_t,
            grad_chosen_ptr,
            weighted(weight, tl.where(counts, gradient, 0.0)),
            BLOCK,
        )
        gradient = -slope * worse_slope * rejected_share
        store_gradient(
            pair,
            rejected_steps,
            rejected_cu_ptr,
            rejected_mask_ptr,
            rejected_mask_stride_b,
            rejected_mask_stride_t,
            grad_rejected_ptr,
            weighted(weight, tl.where(counts, gradient, 0.0)),
            BLOCK,
        )
    if tl.program_id(1) == 0:
        partials_ptr += pair * NUM_METRICS
        tl.store(partials_ptr, weighted(weight, tl.where(counts, loss, 0.0)))
        tl.store(partials_ptr + 1, tl.where(counts, 1.0, 0.0))
        tl.store(partials_ptr + 2, tl.where(counts & (x > y), 1.0, 0.0))
        tl.store(partials_ptr + 3, tl.where(counts, beta * x, 0.0))
        tl.store(partials_ptr + 4, tl.where(counts, beta * y, 0.0))
        tl.store(partials_ptr + 5, tl.where(counts, logp, 0.0))
        tl.store(partials_ptr + 6, tl.where(counts, other_logp, 0.0))
        tl.store(partials_ptr + 7, tl.where(counts, nll, 0.0))


@kernel()
def _kto_loss_kernel(
    steps: tl.int64,
    cu_seqlens_ptr,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    grad_ptr,
    desirable_ptr,
    desirable_stride: tl.int64,
    kl_ptr,
    beta: tl.float32,
    desirable_weight: tl.float32,
    undesirable_weight: tl.float32,
    denominator: tl.float32,
    denominator_ptr,
    partials_ptr,
    BLOCK: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    count, logp, ratio, malformed = sum_completion(
        example, steps, cu_seqlens_ptr, slices_of(partials_ptr, NUM_KTO_METRICS, example, 0), BLOCK
    )
    desirable = tl.load(desirable_ptr + example * desirable_stride) != 0
    good, bad = (count > 0) & desirable, (count > 0) & ~desirable
    slope = tl.where(desirable, beta, -beta)
    x = slope * (ratio - tl.load(kl_ptr))
    _, wrong = log_sigmoid(x)
    _, right = log_sigmoid(-x)
    loss = tl.where(desirable, desirable_weight, undesirable_weight) * wrong
    weight = poison_if(malformed, inverse_denominator(denominator, denominator_ptr))
    if grad_ptr is not None:
        gradient = weighted(-weight, tl.where(count > 0, loss * slope * right, 0.0))
        store_gradient(
            example,
            steps,
            cu_seqlens_ptr,
            mask_ptr,
            mask_stride_b,
            mask_stride_t,
            grad_ptr,
            gradient,
            BLOCK,
        )
    if tl.program_id(1) == 0:
        partials_ptr += example * NUM_KTO_METRICS
        tl.store(partials_ptr, weighted(weight, tl.where(count > 0, loss, 0.0)))
        tl.store(partials_ptr + 1, tl.where(good, 1.0, 0.0))
        tl.store(partials_ptr + 2, tl.where(bad, 1.0, 0.0))
        tl.store(partials_ptr + 3, tl.where(good, beta * ratio, 0.0))
        tl.store(partials_ptr + 4, tl.where(bad, beta * ratio, 0.0))
        tl.store(partials_ptr + 5, tl.where(good, logp, 0.0))
        tl.store(partials_ptr + 6, tl.where(bad, logp, 0.0))


def preference_loss(a: PreferenceLossArguments) -> None:
    with torch.cuda.device_of(a.loss):
        if a.pairs:
            sum_slices((a.chosen, a.rejected), a.pairs, a.partials, a.metrics.shape[0])
            parts = count_parts(a.pairs, max(a.chosen.steps, a.rejected.steps))
            _preference_loss_kernel[(a.pairs, parts)](
                *destination(a.chosen),
                *destination(a.rejected),
                float(a.beta),
                float(a.margin),
                float(a.positive_weight),
                float(a.negative_weight),
                float(a.nll_coef),
                a.denominator.number,
                a.denominator.tensor,
                a.partials,
                LINK=a.link,
                LENGTH_NORMALISE=a.length_normalise,
                ODDS=a.odds,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        merge_partials(a.partials, a.pairs, a.loss, a.metrics, 0, a.metrics.shape[0])


def kto_loss(a: KtoLossArguments) -> None:
    with torch.cuda.device_of(a.loss):
        if a.examples:
            sum_slices((a.completions,), a.examples, a.partials, a.metrics.shape[0])
            parts = count_parts(a.examples, a.completions.steps)
            _kto_loss_kernel[(a.examples, parts)](
                *destination(a.completions),
                a.desirable,
                a.desirable.stride(0),
                a.kl,
                float(a.beta),
                float(a.desirable_weight),
                float(a.undesirable_weight),
                a.denominator.number,
                a.denominator.tensor,
                a.partials,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        merge_partials(a.partials, a.examples, a.loss, a.metrics, 0, a.metrics.shape[0])
