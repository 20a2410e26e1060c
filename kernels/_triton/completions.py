"""Sums over the tokens of completions, and the gradient that all tokens of one have.

A completion is summed in slices, so that few long ones have many programs. A slice has the same
tokens, added in the same order, however many programs there are: by the place of a token in its
completion alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.preference_loss import COMPLETION_SLICES, CompletionsArguments
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.sequences import bounds, load_tokens, valid_tokens

# tokens of a slice, of every SLICES * BLOCK, and those that a program gives gradients at once
BLOCK = 1024
WARPS = 8
MANY_PROGRAMS = 1024
SLICES = tl.constexpr(COMPLETION_SLICES)
SLICE_FLOATS = tl.constexpr(4)


@triton.jit
def _sum_slices(
    completion,
    steps,
    cu_seqlens_ptr,
    logp_ptr,
    logp_stride_b,
    logp_stride_t,
    ref_ptr,
    ref_stride_b,
    ref_stride_t,
    mask_ptr,
    mask_stride_b,
    mask_stride_t,
    slices_ptr,
    BLOCK: tl.constexpr,
):
    """Of every slice with tokens: valid ones, sum of logp, and sum of logp - ref."""
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    first, length, _, _ = bounds(completion, tl.num_programs(0), steps, cu_seqlens_ptr)
    logp_ptr += completion * logp_stride_b + first * logp_stride_t
    if ref_ptr is not None:
        ref_ptr += completion * ref_stride_b + first * ref_stride_t
    if mask_ptr is not None:
        mask_ptr += completion * mask_stride_b + first * mask_stride_t
    zeros = tl.zeros([BLOCK], tl.float32)
    for slice in range(part, tl.minimum(SLICES, tl.cdiv(length, BLOCK)), parts):
        count, total, ratio = zeros, zeros, zeros
        for start in range(slice * BLOCK, length, SLICES * BLOCK):
            token = start + tl.arange(0, BLOCK)
            # masked ones too, so that no load waits for the mask: what they hold must not count
            logp = load_tokens(logp_ptr, token, logp_stride_t, token < length)
            if ref_ptr is not None:
                ref = load_tokens(ref_ptr, token, ref_stride_t, token < length)
            keep = valid_tokens(mask_ptr, token, mask_stride_t, length)
            count += tl.where(keep, 1.0, 0.0)
            total += tl.where(keep, logp, 0.0)
            if ref_ptr is not None:
                ratio += tl.where(keep, logp - ref, 0.0)
        tl.store(slices_ptr + slice, tl.sum(count))
        tl.store(slices_ptr + SLICES + slice, tl.sum(total))
        if ref_ptr is not None:
            total = ratio
        tl.store(slices_ptr + 2 * SLICES + slice, tl.sum(total))


@kernel()
def _completion_slices_kernel(
    one_steps: tl.int64,
    one_cu_ptr,
    one_ptr,
    one_stride_b: tl.int64,
    one_stride_t: tl.int64,
    one_ref_ptr,
    one_ref_stride_b: tl.int64,
    one_ref_stride_t: tl.int64,
    one_mask_ptr,
    one_mask_stride_b: tl.int64,
    one_mask_stride_t: tl.int64,
    other_steps: tl.int64,
    other_cu_ptr,
    other_ptr,
    other_stride_b: tl.int64,
    other_stride_t: tl.int64,
    other_ref_ptr,
    other_ref_stride_b: tl.int64,
    other_ref_stride_t: tl.int64,
    other_mask_ptr,
    other_mask_stride_b: tl.int64,
    other_mask_stride_t: tl.int64,
    partials_ptr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    completion, side = tl.program_id(0).to(tl.int64), tl.program_id(2)
    own_ptr = slices_of(partials_ptr, METRICS, completion, side)
    if side == 0:
        _sum_slices(
            completion,
            one_steps,
            one_cu_ptr,
            one_ptr,
            one_stride_b,
            one_stride_t,
            one_ref_ptr,
            one_ref_stride_b,
            one_ref_stride_t,
            one_mask_ptr,
            one_mask_stride_b,
            one_mask_stride_t,
            own_ptr,
            BLOCK,
        )
    else:
        _sum_slices(
            completion,
            other_steps,
            other_cu_ptr,
            other_ptr,
            other_stride_b,
            other_stride_t,
            other_ref_ptr,
            other_ref_stride_b,
            other_ref_stride_t,
            other_mask_ptr,
            other_mask_stride_b,
            other_mask_stride_t,
            own_ptr,
            BLOCK,
        )


@triton.jit
def slices_of(partials_ptr, METRICS: tl.constexpr, completion, side):
    """The slices of a completion: they lie after the rows of metrics, one a program of axis 0."""
    completions = tl.num_programs(0).to(tl.int64)
    row = side * completions + completion
    return partials_ptr + completions * METRICS + row * SLICES * SLICE_FLOATS


@triton.jit
def sum_completion(completion, steps, cu_seqlens_ptr, slices_ptr, BLOCK: tl.constexpr):
    """Valid tokens, sum of logp, sum of logp - ref, and whether the completion is malformed."""
    _, length, _, malformed = bounds(completion, tl.num_programs(0), steps, cu_seqlens_ptr)
    slice = tl.arange(0, SLICES)
    has_tokens = slice < tl.cdiv(length, BLOCK)
    count = tl.load(slices_ptr + slice, mask=has_tokens, other=0)
    total = tl.load(slices_ptr + SLICES + slice, mask=has_tokens, other=0)
    ratio = tl.load(slices_ptr + 2 * SLICES + slice, mask=has_tokens, other=0)
    return tl.sum(count), tl.sum(total), tl.sum(ratio), malformed


@triton.jit
def store_gradient(
    completion,
    steps,
    cu_seqlens_ptr,
    mask_ptr,
    mask_stride_b,
    mask_stride_t,
    grad_ptr,
    gradient,
    BLOCK: tl.constexpr,
):
    """All valid tokens of a completion have the same gradient; those of the program's part."""
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    first, length, grad_start, _ = bounds(completion, tl.num_programs(0), steps, cu_seqlens_ptr)
    grad_ptr += grad_start
    if mask_ptr is not None:
        mask_ptr += completion * mask_stride_b + first * mask_stride_t
    for start in range(part * BLOCK, length, parts * BLOCK):
        token = start + tl.arange(0, BLOCK)
        keep = valid_tokens(mask_ptr, token, mask_stride_t, length)
        tl.store(grad_ptr + token, tl.where(keep, gradient, 0.0), mask=token < length)


def count_parts(rows: int, steps: int) -> int:
    """Programs per row."""
    return max(1, min(MANY_PROGRAMS // rows, triton.cdiv(steps, BLOCK)))


def _sources(a: CompletionsArguments) -> tuple:
    tensors = (*strided(a.logprobs), *strided(a.ref_logprobs), *strided(a.mask))
    return (a.steps, a.cu_seqlens, *tensors)


def destination(a: CompletionsArguments) -> tuple:
    """Where the gradient goes, as kernel arguments."""
    return (a.steps, a.cu_seqlens, *strided(a.mask), a.grad_logprobs)


def sum_slices(
    sides: tuple[CompletionsArguments, ...], completions: int, partials: Tensor, metrics: int
) -> None:
    """Sums the slices of one or two sides of as many completions each into `partials`, whose rows
    of metrics come first.
    """
    steps = max(side.steps for side in sides)
    parts = min(count_parts(len(sides) * completions, steps), COMPLETION_SLICES)
    _completion_slices_kernel[(completions, parts, len(sides))](
        *_sources(sides[0]),
        *_sources(sides[-1]),
        partials,
        METRICS=metrics,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
