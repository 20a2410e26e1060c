"""Policy loss, gradients and metrics: a program a sequence or part of it, then one that adds up.

The partial sums are added in the order of the sequences, so the result does not depend on timing.
Where a term needs the whole sequence, each of its programs reads all of it, in one order: no
gradient depends on the number of programs.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.policy_loss import MIN_PARTIALS, PolicyLossArguments
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.policy_part import INF, NUM_METRICS, RATIO_MAX, RATIO_MIN, part
from warpo.kernels._triton.policy_sequence import sequence_kl, sequence_sums, sum_by_log_ratio
from warpo.kernels._triton.policy_terms import (
    PREFIX_RATIO,
    PRODUCT_RATIO,
    SEQUENCE_RATIO,
    surrogate_bounds,
)
from warpo.kernels._triton.sequences import bounds as bounds_of
from warpo.kernels._triton.sequences import inverse_denominator, poison_if

BLOCK = 256
WARPS = 4
REDUCE_BLOCK = 128


@kernel()
def _policy_loss_kernel(
    logprobs_ptr,
    logprobs_stride_b: tl.int64,
    logprobs_stride_t: tl.int64,
    old_ptr,
    old_stride_b: tl.int64,
    old_stride_t: tl.int64,
    advantages_ptr,
    advantages_stride_b: tl.int64,
    advantages_stride_t: tl.int64,
    ref_ptr,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    sampler_ptr,
    sampler_stride_b: tl.int64,
    sampler_stride_t: tl.int64,
    entropy_ptr,
    entropy_stride_b: tl.int64,
    entropy_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    cu_seqlens_ptr,
    steps: tl.int64,
    parts: tl.int64,
    ratio_low: tl.float32,
    ratio_high: tl.float32,
    dual_clip: tl.float32,
    tau_positive: tl.float32,
    tau_negative: tl.float32,
    correction_low: tl.float32,
    correction_high: tl.float32,
    kl_coef: tl.float32,
    adaptive_kl_coef_ptr,
    entropy_coef: tl.float32,
    limit: tl.float32,
    denominator: tl.float32,
    denominator_ptr,
    grad_ptr,
    grad_entropy_ptr,
    partials_ptr,
    RATIO_LEVEL: tl.constexpr,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    CORRECTION_SEQUENCE: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    KL_SEQUENCE: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sequence = program // parts
    first, length, grad_start, malformed = bounds_of(
        sequence, tl.num_programs(0) // parts, steps, cu_seqlens_ptr
    )
    logprobs_ptr += sequence * logprobs_stride_b + first * logprobs_stride_t
    old_ptr += sequence * old_stride_b + first * old_stride_t
    advantages_ptr += sequence * advantages_stride_b + first * advantages_stride_t
    if KL != 0:
        ref_ptr += sequence * ref_stride_b + first * ref_stride_t
    if CORRECTION != 0:
        sampler_ptr += sequence * sampler_stride_b + first * sampler_stride_t
    if entropy_ptr is not None:
        entropy_ptr += sequence * entropy_stride_b + first * entropy_stride_t
    if mask_ptr is not None:
        mask_ptr += sequence * mask_stride_b + first * mask_stride_t
    if grad_ptr is not None:
        grad_ptr += grad_start
    if grad_entropy_ptr is not None:
        grad_entropy_ptr += grad_start
    views = (
        (logprobs_ptr, logprobs_stride_t),
        (old_ptr, old_stride_t),
        (advantages_ptr, advantages_stride_t),
        (ref_ptr, ref_stride_t),
        (sampler_ptr, sampler_stride_t),
        (entropy_ptr, entropy_stride_t),
        (mask_ptr, mask_stride_t),
    )
    bounds = (ratio_low, ratio_high, dual_clip, tau_positive, tau_negative)
    correction_bounds = (correction_low, correction_high)

    part_length = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    begin = tl.minimum(program % parts * part_length, length)
    end = tl.minimum(begin + part_length, length)
    # a part without tokens needs nothing of its sequence
    whole = tl.where(begin < end, length, 0)
    tokens = length.to(tl.float32)
    log_ratio, log_weight, shared_derivative = 0.0, 0.0, 0.0
    WITH_RATIO: tl.constexpr = RATIO_LEVEL == SEQUENCE_RATIO or RATIO_LEVEL == PRODUCT_RATIO  # noqa: SIM109
    WITH_CORRECTION: tl.constexpr = CORRECTION != 0 and CORRECTION_SEQUENCE
    if WITH_RATIO or WITH_CORRECTION or (SEQUENCE_MEAN and mask_ptr is not None):
        tokens, log_ratio, log_weight = sequence_sums(
            views, whole, bounds, SURROGATE, WITH_RATIO, WITH_CORRECTION, BLOCK
        )
    tokens = tl.maximum(tokens, 1.0)
    if WITH_RATIO:
        if RATIO_LEVEL == SEQUENCE_RATIO:
            log_ratio /= tokens
        if grad_ptr is not None:
            shared_derivative = sum_by_log_ratio(
                views,
                whole,
                log_ratio,
                log_weight,
                bounds,
                correction_bounds,
                limit,
                SURROGATE,
                CORRECTION,
                CORRECTION_SEQUENCE,
                BLOCK,
            )
            if RATIO_LEVEL == SEQUENCE_RATIO:
                shared_derivative /= tokens
    kl_of_sequence = (tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32))
    if KL != 0 and KL_SEQUENCE:
        kl_of_sequence = sequence_kl(views, whole, limit, KL, STRAIGHT_THROUGH, BLOCK)
    weight = inverse_denominator(denominator, denominator_ptr)
    if SEQUENCE_MEAN:
        weight /= tokens
    weight = poison_if(malformed, weight)
    if adaptive_kl_coef_ptr is not None:
        kl_coef = tl.load(adaptive_kl_coef_ptr)
    part(
        views,
        begin,
        end,
        (log_ratio, log_weight, shared_derivative, kl_of_sequence),
        weight,
        bounds,
        correction_bounds,
        (kl_coef, entropy_coef),
        limit,
        (grad_ptr, grad_entropy_ptr, partials_ptr + program * NUM_METRICS),
        RATIO_LEVEL,
        SURROGATE,
        CORRECTION,
        CORRECTION_SEQUENCE,
        KL,
        STRAIGHT_THROUGH,
        KL_SEQUENCE,
        BLOCK,
    )


@kernel()
def _reduce_kernel(
    partials_ptr,
    rows: tl.int64,
    kl_coef: tl.float32,
    adaptive_kl_coef_ptr,
    entropy_coef: tl.float32,
    loss_ptr,
    metrics_ptr,
    BLOCK: tl.constexpr,
):
    metric = tl.arange(0, NUM_METRICS)
    total = tl.zeros([BLOCK, NUM_METRICS], tl.float32)
    ratio_min = tl.full([BLOCK], INF, tl.float32)
    ratio_max = tl.full([BLOCK], -INF, tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        row_ptr = partials_ptr + row * NUM_METRICS
        inside = row < rows
        total += tl.load(row_ptr[:, None] + metric[None, :], mask=inside[:, None], other=0)
        ratio_min = tl.minimum(ratio_min, tl.load(row_ptr + RATIO_MIN, mask=inside, other=INF))
        ratio_max = tl.maximum(ratio_max, tl.load(row_ptr + RATIO_MAX, mask=inside, other=-INF))
    metrics = tl.sum(total, 0)
    # the comparisons drop a NaN, the sum of the ratios, metric 7, does not
    ratios = tl.sum(tl.where(metric == 7, metrics, 0.0))
    extreme = tl.where(metric == RATIO_MIN, tl.min(ratio_min), tl.max(ratio_max))
    extreme = tl.where(ratios == ratios, extreme, ratios)
    metrics = tl.where((metric == RATIO_MIN) | (metric == RATIO_MAX), extreme, metrics)
    tl.store(metrics_ptr + metric, metrics)
    if adaptive_kl_coef_ptr is not None:
        kl_coef = tl.load(adaptive_kl_coef_ptr)
    share = tl.where(metric == 0, 1.0, tl.where(metric == 1, kl_coef, -entropy_coef))
    counts = (metric < 2) | (metric == 2) & (entropy_coef != 0)
    tl.store(loss_ptr, tl.sum(tl.where(counts, share * metrics, 0.0)))


def _count_parts(a: PolicyLossArguments) -> int:
    """Programs per sequence."""
    # the sums up to a token are made in the order of the tokens
    if a.sequences == 0 or a.objective.ratio_level == PREFIX_RATIO.value:
        return 1
    return max(1, min(MIN_PARTIALS // a.sequences, triton.cdiv(a.steps, BLOCK)))


def policy_loss(a: PolicyLossArguments) -> None:
    o, term, parts = a.objective, a.kl_penalty, _count_parts(a)
    per_token = (
        a.logprobs,
        a.old_logprobs,
        a.advantages,
        a.ref_logprobs,
        a.sampler_logprobs,
        a.entropy,
        a.mask,
    )
    numbers = [*surrogate_bounds(o), o.correction_low, o.correction_high, term.kl_coef]
    with torch.cuda.device_of(a.logprobs):
        if a.sequences:
            _policy_loss_kernel[(a.sequences * parts,)](
                *[part for tensor in per_token for part in strided(tensor)],
                a.cu_seqlens,
                a.steps,
                parts,
                *map(float, numbers),
                term.adaptive_kl_coef,
                float(o.entropy_coef),
                float(o.log_ratio_limit),
                a.denominator.number,
                a.denominator.tensor,
                a.grad_logprobs,
                a.grad_entropy,
                a.partials,
                RATIO_LEVEL=o.ratio_level,
                SURROGATE=o.surrogate,
                CORRECTION=o.correction,
                CORRECTION_SEQUENCE=o.correction_sequence,
                KL=term.kl,
                STRAIGHT_THROUGH=o.kl_straight_through,
                KL_SEQUENCE=o.kl_sequence,
                SEQUENCE_MEAN=o.sequence_mean,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        _reduce_kernel[(1,)](
            a.partials,
            a.sequences * parts,
            float(term.kl_coef),
            term.adaptive_kl_coef,
            float(o.entropy_coef),
            a.loss,
            a.metrics,
            BLOCK=REDUCE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
