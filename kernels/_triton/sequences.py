"""What the losses over sequences share: where the tokens of a program lie, and the results of the
programs merged in their order.
"""

import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.offsets import extent

MERGE_BLOCK = 128


@triton.jit
def bounds(sequence, sequences, steps, cu_seqlens_ptr):
    """Step at which a sequence begins in its row, its length, where its gradient begins, and
    whether its offsets are malformed: then loss and gradient are NaN.
    """
    if cu_seqlens_ptr is None:
        first = tl.zeros_like(sequence)
        length = steps
        grad_start = sequence * steps
        malformed = sequence < 0
    else:
        first, end, malformed = extent(
            cu_seqlens_ptr, 1, sequences, sequence, steps, sequence < sequences
        )
        length = end - first
        grad_start = first
    return first, length, grad_start, malformed


@triton.jit
def poison_if(malformed, x):
    return tl.where(malformed, float("nan"), x)


@triton.jit
def valid_tokens(mask_ptr, token, stride, length):
    keep = token < length
    if mask_ptr is not None:
        keep &= tl.load(mask_ptr + token * stride, mask=keep, other=0) != 0
    return keep


@triton.jit
def load_tokens(ptr, token, stride, keep):
    return tl.load(ptr + token * stride, mask=keep, other=0).to(tl.float32)


@triton.jit
def inverse_or_zero(x):
    """Of a count or a denominator: 0 where it is 0, NaN where it is negative or NaN."""
    inverse = tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), float("nan"))
    return tl.where(x == 0, 0.0, inverse)


@triton.jit
def inverse_denominator(number, tensor_ptr):
    if tensor_ptr is not None:
        number = tl.load(tensor_ptr)
    return inverse_or_zero(number)


@triton.jit
def weighted(weight, x):
    """A weight of 0 leaves nothing, also of what is not finite."""
    return tl.where(weight == 0, 0.0, weight * x)


@kernel()
def _merge_partials_kernel(
    partials_ptr,
    rows: tl.int64,
    loss_ptr,
    metrics_ptr,
    METRICS: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST_MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    metric = tl.arange(0, 8)
    column = metric[None, :]
    is_moment = (column >= FIRST_MOMENT) & (column < METRICS)
    is_mean = is_moment & ((column - FIRST_MOMENT) % 2 == 0)
    mean_column = tl.where(is_mean, column, column - 1)
    total = tl.zeros([BLOCK, 8], tl.float32)
    weighted = tl.zeros([BLOCK, 8], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        pointers = partials_ptr + row[:, None] * METRICS
        inside = (row < rows)[:, None]
        total += tl.load(pointers + column, mask=inside & (column < METRICS), other=0)
        if FIRST_MOMENT < METRICS:
            count = tl.load(partials_ptr + row * METRICS + COUNT, mask=row < rows, other=0)
            mean = tl.load(pointers + mean_column, mask=inside & is_moment, other=0)
            counts += count
            weighted += count[:, None] * mean
    result = tl.sum(total, 0)[None, :]
    if FIRST_MOMENT < METRICS:
        merged = tl.sum(weighted, 0)[None, :] * inverse_or_zero(tl.sum(counts))
        spread = tl.zeros([BLOCK, 8], tl.float32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            pointers = partials_ptr + row[:, None] * METRICS
            count = tl.load(partials_ptr + row * METRICS + COUNT, mask=row < rows, other=0)
            inside = (row < rows)[:, None] & is_moment
            difference = tl.load(pointers + mean_column, mask=inside, other=0) - merged
            spread += tl.where(inside, count[:, None] * difference * difference, 0.0)
        result += tl.where(is_moment, tl.sum(spread, 0)[None, :], 0.0)
        result = tl.where(is_mean, merged, result)
    tl.store(metrics_ptr + column, result, mask=column < METRICS)
    tl.store(loss_ptr + column, result, mask=column == 0)


def merge_partials(
    partials: Tensor, rows: int, loss: Tensor, metrics: Tensor, count: int, first_moment: int
) -> None:
    """Rows of partials as one: sums, and from column `first_moment` on pairs of mean and sum of
    squared differences over the count in column `count`. Column 0 is the loss.
    """
    _merge_partials_kernel[(1,)](
        partials,
        rows,
        loss,
        metrics,
        METRICS=metrics.shape[0],
        COUNT=count,
        FIRST_MOMENT=first_moment,
        BLOCK=MERGE_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
