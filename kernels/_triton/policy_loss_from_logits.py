"""Log-probabilities, and the gradient of the policy loss from a second read that hits the L2 cache:
a program a token, two loops over its row.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.policy_loss_from_logits import (
    PolicyLossFromLogitsArguments,
    ScaleGradientArguments,
)
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.logprobs import BLOCK, CHUNKS
from warpo.kernels._triton.online_softmax import (
    FLOOR,
    LN_2,
    LOG2_E,
    _load_width,
    _read,
    _rows,
    inverse_temperature,
)
from warpo.kernels._triton.policy_terms import (
    clamp,
    correction_weight,
    exp,
    is_outside,
    kl_estimate,
    surrogate_bounds,
    surrogate_terms,
)
from warpo.kernels._triton.sequences import inverse_denominator, weighted

# So many threads that a multiprocessor takes one program: what lies between the two reads of the
# rows in flight must fit into the L2 cache.
WARPS, ROW_BLOCK = 32, 8192
SCALE_PROGRAMS = 2048


@triton.jit
def _fill(row_ptr, vocab, value, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        tl.store(
            row_ptr + start + columns,
            tl.full([BLOCK], 0.0, tl.float32) + value,
            mask=start + columns < vocab,
        )


@triton.jit
def _by_logp(
    logp,
    old,
    advantage,
    ref,
    sampler,
    kl_coef,
    bounds,
    correction_bounds,
    limit,
    HAS_OLD: tl.constexpr,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
):
    """Derivative of the loss of one token in its logp, before the weight; blocks of one."""
    log_ratio = logp - old if HAS_OLD else tl.zeros_like(logp)
    ratio = exp(clamp(log_ratio, -limit, limit))
    _, by_log_ratio, by_logp, _, _, _ = surrogate_terms(ratio, logp, advantage, bounds, SURROGATE)
    by_log_ratio = tl.where(is_outside(log_ratio, limit), 0.0, by_log_ratio)
    gradient = by_log_ratio + by_logp
    if CORRECTION != 0:
        weight, _ = correction_weight(old - sampler, correction_bounds, limit, CORRECTION)
        gradient = weight * gradient
    gradient = -gradient
    if KL != 0:
        _, derivative = kl_estimate(logp, ref, limit, KL, STRAIGHT_THROUGH)
        gradient += kl_coef * derivative
    return gradient


@kernel("logits_ptr", "grad_logits_ptr")
def _policy_loss_from_logits_kernel(
    logits_ptr,
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    vocab: tl.int32,
    targets_ptr,
    targets_stride_b: tl.int64,
    targets_stride_t: tl.int64,
    temperature: tl.float32,
    temperature_ptr,
    temperature_stride_b: tl.int64,
    temperature_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    ignore_index: tl.int64,
    steps: tl.int64,
    logprobs_ptr,
    logprobs_stride_b: tl.int64,
    logprobs_stride_t: tl.int64,
    entropy_ptr,
    entropy_stride_b: tl.int64,
    entropy_stride_t: tl.int64,
    cu_seqlens_ptr,
    sequences: tl.int64,
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
    valid_tokens_ptr,
    valid_tokens_stride_b: tl.int64,
    valid_tokens_stride_t: tl.int64,
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
    grad_logits_ptr,
    grad_logits_stride_b: tl.int64,
    grad_logits_stride_t: tl.int64,
    columns_of_a_chunk: tl.int32,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    token = tl.program_id(0).to(tl.int64)
    b, t = token // steps, token % steps
    logprobs_ptr += b * logprobs_stride_b + t * logprobs_stride_t
    entropy_ptr += b * entropy_stride_b + t * entropy_stride_t
    grad_logits_ptr += (b * grad_logits_stride_b + t * grad_logits_stride_t) * WIDTH
    target = tl.load(targets_ptr + b * targets_stride_b + t * targets_stride_t)
    valid = target != ignore_index
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t) != 0
    if cu_seqlens_ptr is not None:
        valid &= t >= tl.load(cu_seqlens_ptr)
        valid &= t < tl.load(cu_seqlens_ptr + sequences)
    if not (valid & (target >= 0) & (target < vocab)):
        result = tl.where(valid, float("nan"), 0.0)
        tl.store(logprobs_ptr, result)
        tl.store(entropy_ptr, result)
        _fill(grad_logits_ptr, vocab, result, BLOCK)
        return

    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + b * temperature_stride_b + t * temperature_stride_t)
    logits_ptr += (b * logits_stride_b + t * logits_stride_t) * WIDTH
    inverse = inverse_temperature(temperature)
    scale = inverse * LOG2_E
    chosen = tl.load(logits_ptr + target).to(tl.float32)
    top, total, weighted_sum = _read(
        logits_ptr, 0, vocab, columns_of_a_chunk, scale, True, REPEAT, LANES, WIDTH
    )
    log_sum = tl.where(total > 0, tl.log(total), float("nan"))
    logprob = (chosen - top) * inverse - log_sum
    logprob = tl.where(logprob > 0, 0.0, logprob)
    entropy = log_sum - LN_2 * weighted_sum / total
    tl.store(logprobs_ptr, logprob)
    tl.store(entropy_ptr, entropy)

    one = tl.zeros([1], tl.float32)
    logp = one + logprob
    old, ref, sampler = logp, logp, logp
    if old_ptr is not None:
        old = one + tl.load(old_ptr + b * old_stride_b + t * old_stride_t)
    advantage = one + tl.load(advantages_ptr + b * advantages_stride_b + t * advantages_stride_t)
    if ref_ptr is not None:
        ref = one + tl.load(ref_ptr + b * ref_stride_b + t * ref_stride_t)
    if sampler_ptr is not None:
        sampler = one + tl.load(sampler_ptr + b * sampler_stride_b + t * sampler_stride_t)
    if adaptive_kl_coef_ptr is not None:
        kl_coef = tl.load(adaptive_kl_coef_ptr)
    weight = inverse_denominator(denominator, denominator_ptr)
    if valid_tokens_ptr is not None:
        weight /= tl.load(valid_tokens_ptr + b * valid_tokens_stride_b + t * valid_tokens_stride_t)
    by_logp = _by_logp(
        logp,
        old,
        advantage,
        ref,
        sampler,
        kl_coef,
        (ratio_low, ratio_high, dual_clip, tau_positive, tau_negative),
        (correction_low, correction_high),
        limit,
        old_ptr is not None,
        SURROGATE,
        CORRECTION,
        KL,
        STRAIGHT_THROUGH,
    )
    by_logp = weighted(weight, tl.sum(by_logp))
    by_entropy = weighted(-weight, entropy_coef)
    if log_sum == log_sum and by_logp == 0 and by_entropy == 0:
        _fill(grad_logits_ptr, vocab, 0.0, BLOCK)
        return

    # d/dx_j = (g (1[j = y] - p_j) - h p_j (log p_j + H)) / T
    log2_sum = log_sum * LOG2_E
    per_p = -(by_logp + by_entropy * entropy) * inverse
    per_log2_p = by_entropy * inverse * LN_2
    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits_ptr + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        log2_p = tl.maximum((x - top) * scale - log2_sum, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        if ENTROPY_GRADIENT:
            gradient = tl.exp2(log2_p) * (per_p - per_log2_p * log2_p)
        else:
            gradient = tl.exp2(log2_p) * per_p
        gradient += tl.where(start + columns == target, by_logp * inverse, 0.0)
        tl.store(grad_logits_ptr + start + columns, gradient, mask=inside)


@kernel("gradient_ptr")
def _scale_gradient_kernel(
    gradient_ptr,
    gradient_stride_b: tl.int64,
    gradient_stride_t: tl.int64,
    vocab: tl.int32,
    steps: tl.int64,
    units: tl.int64,
    factor_ptr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    # a grid of fixed size: where the factor is 1 it ends at once
    if factor == 1.0:
        return
    pieces = tl.cdiv(vocab, BLOCK)
    for unit in range(tl.program_id(0).to(tl.int64), units, tl.num_programs(0)):
        token = unit // pieces
        b, t = token // steps, token % steps
        columns = (unit % pieces * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        row_ptr = gradient_ptr + (b * gradient_stride_b + t * gradient_stride_t) * WIDTH
        x = tl.load(row_ptr + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        tl.store(row_ptr + columns, x * factor, mask=columns < vocab)


def policy_loss_from_logits(a: PolicyLossFromLogitsArguments) -> None:
    forward, o, term = a.forward, a.objective, a.kl_penalty
    tokens, vocab = forward.rows * forward.steps, forward.vocab
    if tokens == 0:
        return
    width = _load_width(forward.logits, a.grad_logits)
    lanes = 32 * WARPS
    constants = (
        a.old_logprobs,
        a.advantages,
        a.ref_logprobs,
        a.sampler_logprobs,
        a.valid_tokens,
    )
    numbers = [*surrogate_bounds(o), o.correction_low, o.correction_high, term.kl_coef]
    with torch.cuda.device_of(forward.logits):
        _policy_loss_from_logits_kernel[(tokens,)](
            *_rows(forward.logits, width),
            vocab,
            *strided(forward.targets),
            float(forward.temperature),
            *strided(forward.token_temperature),
            *strided(forward.mask),
            forward.ignore_index,
            forward.steps,
            *strided(forward.logprobs),
            *strided(forward.entropy),
            a.cu_seqlens,
            a.sequences,
            *[part for tensor in constants for part in strided(tensor)],
            *map(float, numbers),
            term.adaptive_kl_coef,
            float(o.entropy_coef),
            float(o.log_ratio_limit),
            a.denominator.number,
            a.denominator.tensor,
            *_rows(a.grad_logits, width),
            triton.cdiv(vocab, ROW_BLOCK * CHUNKS) * ROW_BLOCK,
            SURROGATE=o.surrogate,
            CORRECTION=o.correction,
            KL=term.kl,
            STRAIGHT_THROUGH=o.kl_straight_through,
            ENTROPY_GRADIENT=o.entropy_coef != 0,
            REPEAT=ROW_BLOCK // (lanes * width),
            LANES=lanes,
            WIDTH=width,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def scale_gradient(a: ScaleGradientArguments) -> None:
    units = a.rows * a.steps * triton.cdiv(a.vocab, BLOCK)
    if units == 0:
        return
    width = _load_width(a.gradient)
    with torch.cuda.device_of(a.gradient):
        _scale_gradient_kernel[(min(units, SCALE_PROGRAMS),)](
            *_rows(a.gradient, width),
            a.vocab,
            a.steps,
            units,
            a.factor,
            BLOCK=BLOCK,
            WIDTH=width,
            num_warps=4,
            enable_fp_fusion=True,
        )
