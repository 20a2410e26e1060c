"""Whitening: a launch for partial results of fixed parts, one that adds those up and writes.

The parts are those of `csrc/math/tiles.h`: tiles of at most BLOCK steps of a row, and program p
takes tiles p, p + programs, ...
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.whiten import WhitenArguments, WhitenBackwardArguments
from warpo.kernels._triton.launch import kernel, strided

BLOCK = 4096
MAX_PROGRAMS = 1024
WARPS = 8


@triton.jit
def _merge(count_a, mean_a, squares_a, count_b, mean_b, squares_b):
    """Count, mean and sum of squared deviations of two parts together."""
    count = count_a + count_b
    # divided first: (difference * count) / count is not always the difference
    share = count_b / tl.maximum(count, 1.0)
    difference = mean_b - mean_a
    mean = mean_a + difference * share
    squares = squares_a + squares_b + difference * difference * (count_a * share)
    return count, mean, squares


@triton.jit
def _tile(tile, columns, per_row, mask_ptr, mask_stride_r, mask_stride_c, BLOCK: tl.constexpr):
    """Row and columns of a tile, which of them exist, and which of those are valid."""
    row = tile // per_row
    column = (tile - row * per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    keep = inside
    if mask_ptr is not None:
        pointers = mask_ptr + row * mask_stride_r + column * mask_stride_c
        keep = inside & (tl.load(pointers, mask=inside, other=0) != 0)
    return row, column, inside, keep


@kernel()
def _whiten_moments_kernel(
    x_ptr,
    x_stride_r: tl.int64,
    x_stride_c: tl.int64,
    mask_ptr,
    mask_stride_r: tl.int64,
    mask_stride_c: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    partials_ptr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    per_row = (columns + BLOCK - 1) // BLOCK
    count, mean, squares = 0.0, 0.0, 0.0
    for tile in range(program, rows * per_row, tl.num_programs(0)):
        row, column, _, keep = _tile(
            tile, columns, per_row, mask_ptr, mask_stride_r, mask_stride_c, BLOCK
        )
        pointers = x_ptr + row * x_stride_r + column * x_stride_c
        x = tl.load(pointers, mask=keep, other=0).to(tl.float32)
        number = tl.sum(keep.to(tl.float32))
        pivot = tl.sum(x) / tl.maximum(number, 1.0)
        difference = tl.where(keep, x - pivot, 0.0)
        shift = tl.sum(difference) / tl.maximum(number, 1.0)
        # from the mean itself: its distance from the pivot is a rounding error
        centred = tl.where(keep, difference - shift, 0.0)
        count, mean, squares = _merge(
            count, mean, squares, number, pivot + shift, tl.sum(centred * centred)
        )
    tl.store(partials_ptr + 3 * program, count)
    tl.store(partials_ptr + 3 * program + 1, mean)
    tl.store(partials_ptr + 3 * program + 2, squares)


@kernel()
def _whiten_kernel(
    x_ptr,
    x_stride_r: tl.int64,
    x_stride_c: tl.int64,
    mask_ptr,
    mask_stride_r: tl.int64,
    mask_stride_c: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    eps: tl.float32,
    partials_ptr,
    stats_ptr,
    whitened_ptr,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MAX_PROGRAMS)
    exists = part < tl.num_programs(0)
    counts = tl.load(partials_ptr + 3 * part, mask=exists, other=0.0)
    means = tl.load(partials_ptr + 3 * part + 1, mask=exists, other=0.0)
    squares = tl.load(partials_ptr + 3 * part + 2, mask=exists, other=0.0)
    count = tl.sum(counts)
    pivot = tl.sum(counts * means) / tl.maximum(count, 1.0)
    # twice, so that equal means give exactly their value
    mean = pivot + tl.sum(counts * (means - pivot)) / tl.maximum(count, 1.0)
    centred = means - mean
    total = tl.sum(squares + counts * centred * centred)
    variance = tl.where(count > 1, total / tl.maximum(count - 1.0, 1.0), 0.0) + eps
    scale = tl.where(variance == 0, 0.0, 1.0 / tl.sqrt_rn(variance))
    if program == 0:
        tl.store(stats_ptr, mean)
        tl.store(stats_ptr + 1, scale)
        tl.store(stats_ptr + 2, count)
    per_row = (columns + BLOCK - 1) // BLOCK
    for tile in range(program, rows * per_row, tl.num_programs(0)):
        row, column, inside, keep = _tile(
            tile, columns, per_row, mask_ptr, mask_stride_r, mask_stride_c, BLOCK
        )
        pointers = x_ptr + row * x_stride_r + column * x_stride_c
        x = tl.load(pointers, mask=keep, other=0).to(tl.float32)
        whitened = (x - mean) * scale
        if not SHIFT_MEAN:
            whitened += mean
        tl.store(whitened_ptr + row * columns + column, tl.where(keep, whitened, 0.0), mask=inside)


@triton.jit
def _load_grad(
    x_ptr,
    x_stride_r,
    x_stride_c,
    grad_ptr,
    grad_stride_r,
    grad_stride_c,
    row,
    column,
    keep,
    mean,
    scale,
):
    """Upstream gradient and standardised element, 0 and anything where not valid."""
    x = tl.load(x_ptr + row * x_stride_r + column * x_stride_c, mask=keep, other=0)
    grad = tl.load(grad_ptr + row * grad_stride_r + column * grad_stride_c, mask=keep, other=0)
    return grad, (x.to(tl.float32) - mean) * scale


@kernel()
def _whiten_grad_sums_kernel(
    x_ptr,
    x_stride_r: tl.int64,
    x_stride_c: tl.int64,
    mask_ptr,
    mask_stride_r: tl.int64,
    mask_stride_c: tl.int64,
    grad_ptr,
    grad_stride_r: tl.int64,
    grad_stride_c: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    stats_ptr,
    partials_ptr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    mean = tl.load(stats_ptr)
    scale = tl.load(stats_ptr + 1)
    grad_sum, moment = 0.0, 0.0
    per_row = (columns + BLOCK - 1) // BLOCK
    for tile in range(program, rows * per_row, tl.num_programs(0)):
        row, column, _, keep = _tile(
            tile, columns, per_row, mask_ptr, mask_stride_r, mask_stride_c, BLOCK
        )
        grad, standardised = _load_grad(
            x_ptr,
            x_stride_r,
            x_stride_c,
            grad_ptr,
            grad_stride_r,
            grad_stride_c,
            row,
            column,
            keep,
            mean,
            scale,
        )
        grad_sum += tl.sum(grad)
        moment += tl.sum(tl.where(keep, grad * standardised, 0.0))
    tl.store(partials_ptr + 3 * program, grad_sum)
    tl.store(partials_ptr + 3 * program + 1, moment)


@kernel()
def _whiten_grad_kernel(
    x_ptr,
    x_stride_r: tl.int64,
    x_stride_c: tl.int64,
    mask_ptr,
    mask_stride_r: tl.int64,
    mask_stride_c: tl.int64,
    grad_ptr,
    grad_stride_r: tl.int64,
    grad_stride_c: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    stats_ptr,
    partials_ptr,
    grad_x_ptr,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    mean = tl.load(stats_ptr)
    scale = tl.load(stats_ptr + 1)
    count = tl.load(stats_ptr + 2)
    part = tl.arange(0, MAX_PROGRAMS)
    exists = part < tl.num_programs(0)
    mean_grad = tl.sum(tl.load(partials_ptr + 3 * part, mask=exists, other=0.0))
    mean_grad /= tl.maximum(count, 1.0)
    slope = tl.sum(tl.load(partials_ptr + 3 * part + 1, mask=exists, other=0.0))
    slope /= tl.maximum(count - 1.0, 1.0)
    per_row = (columns + BLOCK - 1) // BLOCK
    for tile in range(program, rows * per_row, tl.num_programs(0)):
        row, column, inside, keep = _tile(
            tile, columns, per_row, mask_ptr, mask_stride_r, mask_stride_c, BLOCK
        )
        grad, standardised = _load_grad(
            x_ptr,
            x_stride_r,
            x_stride_c,
            grad_ptr,
            grad_stride_r,
            grad_stride_c,
            row,
            column,
            keep,
            mean,
            scale,
        )
        result = (grad - mean_grad - slope * standardised) * scale
        if not SHIFT_MEAN:
            result += mean_grad
        tl.store(grad_x_ptr + row * columns + column, tl.where(keep, result, 0.0), mask=inside)


def whiten_forward(a: WhitenArguments) -> None:
    grid = (min(MAX_PROGRAMS, a.rows * triton.cdiv(a.columns, BLOCK)),)
    with torch.cuda.device_of(a.x):
        _whiten_moments_kernel[grid](
            *strided(a.x),
            *strided(a.mask),
            a.rows,
            a.columns,
            a.partials,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        _whiten_kernel[grid](
            *strided(a.x),
            *strided(a.mask),
            a.rows,
            a.columns,
            float(a.eps),
            a.partials,
            a.stats,
            a.whitened,
            SHIFT_MEAN=a.shift_mean,
            BLOCK=BLOCK,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def whiten_backward(a: WhitenBackwardArguments) -> None:
    f = a.forward
    grid = (min(MAX_PROGRAMS, f.rows * triton.cdiv(f.columns, BLOCK)),)
    tensors = (*strided(f.x), *strided(f.mask), *strided(a.grad_whitened))
    common = (*tensors, f.rows, f.columns, f.stats, f.partials)
    with torch.cuda.device_of(f.x):
        _whiten_grad_sums_kernel[grid](*common, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
        _whiten_grad_kernel[grid](
            *common,
            a.grad_x,
            SHIFT_MEAN=f.shift_mean,
            BLOCK=BLOCK,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
