"""One number from the values of sequences, and its gradient: a program a part of a sequence, then
one that adds up the parts in their order.

The formulas are those of `csrc/math/aggregate.h`.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.aggregate import (
    MIN_PARTS,
    AggregateArguments,
    AggregateBackwardArguments,
)
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.sequences import (
    bounds,
    inverse_denominator,
    load_tokens,
    poison_if,
    weighted,
)

BLOCK = 512
WARPS = 4
# sequences and parts that the last program takes at once
REDUCE = ((512, 1), (32, 32))
# the enumeration of csrc/arguments/aggregate.h
TOKEN_MEAN, SEQUENCE_MEAN_TOKEN_MEAN = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _part_of(sequences, parts, steps, cu_seqlens_ptr):
    """Sequence, its first step in its row, first and end of the part, where its gradient is, and
    whether it is malformed.
    """
    sequence = tl.program_id(0).to(tl.int64) // parts
    part = tl.program_id(0).to(tl.int64) % parts
    first, length, grad_start, malformed = bounds(sequence, sequences, steps, cu_seqlens_ptr)
    share = tl.cdiv(length, parts)
    begin = part * share
    return sequence, first, begin, tl.minimum(begin + share, length), grad_start, malformed


@triton.jit
def _weights(mask_ptr, token, stride, end):
    """Of tokens, 0 of those that are not valid; a negative one is NaN, and so is the result."""
    inside = token < end
    if mask_ptr is None:
        weight = tl.where(inside, 1.0, 0.0)
    elif mask_ptr.dtype.element_ty == tl.float32:
        weight = tl.load(mask_ptr + token * stride, mask=inside, other=0)
        weight = tl.where(weight >= 0, weight, float("nan"))
    else:
        flag = tl.load(mask_ptr + token * stride, mask=inside, other=0)
        weight = tl.where(flag != 0, 1.0, 0.0)
    return weight


@kernel()
def _sum_kernel(
    values_ptr,
    values_stride_b: tl.int64,
    values_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    cu_seqlens_ptr,
    sequences: tl.int64,
    parts: tl.int64,
    steps: tl.int64,
    weights_ptr,
    BLOCK: tl.constexpr,
):
    sequence, first, begin, end, _, malformed = _part_of(sequences, parts, steps, cu_seqlens_ptr)
    values_ptr += sequence * values_stride_b + first * values_stride_t
    if mask_ptr is not None:
        mask_ptr += sequence * mask_stride_b + first * mask_stride_t
    total, tokens = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = _weights(mask_ptr, token, mask_stride_t, end)
        total += weight * load_tokens(values_ptr, token, values_stride_t, weight != 0)
        tokens += weight
    partials_ptr = weights_ptr + sequences + tl.program_id(0).to(tl.int64) * 2
    tl.store(partials_ptr, poison_if(malformed, tl.sum(total)))
    tl.store(partials_ptr + 1, tl.sum(tokens))


@kernel()
def _reduce_kernel(
    sequences: tl.int64,
    parts: tl.int64,
    denominator: tl.float32,
    denominator_ptr,
    weights_ptr,
    result_ptr,
    AGGREGATION: tl.constexpr,
    BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PARTS: tl.constexpr,
):
    partials_ptr = weights_ptr + sequences
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, sequences * parts, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counts += tl.load(partials_ptr + row * 2 + 1, mask=row < sequences * parts, other=0)
    if denominator_ptr is None:
        count = sequences.to(tl.float32)
        if AGGREGATION == TOKEN_MEAN:
            count = tl.sum(counts)
        denominator = tl.where(denominator >= 0, denominator, count)
    inverse = inverse_denominator(denominator, denominator_ptr)
    result = tl.zeros([SEQUENCES], tl.float32)
    for start in range(0, sequences, SEQUENCES):
        sequence = start + tl.arange(0, SEQUENCES)
        total = tl.zeros([SEQUENCES, PARTS], tl.float32)
        tokens = tl.zeros([SEQUENCES, PARTS], tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            pointers = partials_ptr + (sequence[:, None] * parts + part[None, :]) * 2
            inside = (sequence < sequences)[:, None] & (part < parts)[None, :]
            total += tl.load(pointers, mask=inside, other=0)
            tokens += tl.load(pointers + 1, mask=inside, other=0)
        own = tl.sum(tokens, 1)
        weight = tl.zeros([SEQUENCES], tl.float32) + inverse
        if AGGREGATION == SEQUENCE_MEAN_TOKEN_MEAN:
            weight = tl.where(own > 0, inverse / tl.where(own > 0, own, 1.0), inverse)
        tl.store(weights_ptr + sequence, weight, mask=sequence < sequences)
        result += weighted(weight, tl.sum(total, 1))
    tl.store(result_ptr, tl.sum(result))


@triton.jit
def _zero(ptr, begin, end, BLOCK: tl.constexpr):
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(ptr + token, tl.zeros([BLOCK], tl.float32), mask=token < end)


@kernel()
def _gradient_kernel(
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    cu_seqlens_ptr,
    sequences: tl.int64,
    parts: tl.int64,
    steps: tl.int64,
    weights_ptr,
    grad_ptr,
    grad_values_ptr,
    BLOCK: tl.constexpr,
):
    sequence, first, begin, end, out, malformed = _part_of(sequences, parts, steps, cu_seqlens_ptr)
    value = poison_if(malformed, tl.load(weights_ptr + sequence) * tl.load(grad_ptr))
    if cu_seqlens_ptr is not None:
        # tokens that belong to no sequence; none if the first and the last are malformed
        if tl.program_id(0) == 0:
            _zero(grad_values_ptr, 0, first, BLOCK)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _zero(
                grad_values_ptr,
                tl.where(malformed, steps, tl.load(cu_seqlens_ptr + sequences)),
                steps,
                BLOCK,
            )
    if mask_ptr is not None:
        mask_ptr += sequence * mask_stride_b + first * mask_stride_t
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = _weights(mask_ptr, token, mask_stride_t, end)
        gradient = tl.where(weight != 0, weight * value, 0.0)
        tl.store(grad_values_ptr + out + token, gradient, mask=token < end)


def _parts(sequences: int, steps: int) -> int:
    return max(1, min(MIN_PARTS // max(sequences, 1), triton.cdiv(steps, BLOCK)))


def aggregate_forward(a: AggregateArguments) -> None:
    parts = _parts(a.sequences, a.steps)
    at_once = REDUCE[parts > 1]
    with torch.cuda.device_of(a.values):
        if a.sequences:
            _sum_kernel[(a.sequences * parts,)](
                *strided(a.values),
                *strided(a.mask),
                a.cu_seqlens,
                a.sequences,
                parts,
                a.steps,
                a.weights,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        _reduce_kernel[(1,)](
            a.sequences,
            parts,
            a.denominator.number,
            a.denominator.tensor,
            a.weights,
            a.result,
            AGGREGATION=a.aggregation,
            BLOCK=BLOCK,
            SEQUENCES=at_once[0],
            PARTS=at_once[1],
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def aggregate_backward(a: AggregateBackwardArguments) -> None:
    parts = _parts(a.sequences, a.steps)
    with torch.cuda.device_of(a.weights):
        _gradient_kernel[(a.sequences * parts,)](
            *strided(a.mask),
            a.cu_seqlens,
            a.sequences,
            parts,
            a.steps,
            a.weights,
            a.grad,
            a.grad_values,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
