"""Tanh-squashed Gaussian actions and their logprobs, and the gradient: a program a block of rows,
which walks their columns.

The formulas are those of `csrc/math/squashed_gaussian.h`.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.squashed_gaussian import (
    SquashedGaussianArguments,
    SquashedGaussianBackwardArguments,
)
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.logistic import LN_2, expm1, log1p

ROWS, COLUMNS = 32, 16
WARPS = 4
HALF_LOG_2_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _load(ptr, stride_b, stride_a, row, column, inside):
    return tl.load(ptr + row * stride_b + column * stride_a, mask=inside, other=0).to(tl.float32)


@triton.jit
def _sample(mean, log_std, noise, low, high):
    """s, exp(s) noise, |u|, exp(-2 |u|) and the action."""
    # by comparison, so that NaN stays
    s = tl.where(log_std > high, high, tl.where(log_std < low, low, log_std))
    spread = tl.exp(s) * noise
    u = mean + spread
    magnitude = tl.abs(u)
    e = tl.exp(-2.0 * magnitude)
    tanh = -expm1(-2.0 * magnitude) / (1.0 + e)
    return s, spread, magnitude, e, tl.where(u < 0, -tanh, tanh)


@kernel()
def _squashed_gaussian_fwd_kernel(
    rows: tl.int64,
    columns: tl.int64,
    mean_ptr,
    mean_stride_b: tl.int64,
    mean_stride_a: tl.int64,
    log_std_ptr,
    log_std_stride_b: tl.int64,
    log_std_stride_a: tl.int64,
    noise_ptr,
    noise_stride_b: tl.int64,
    noise_stride_a: tl.int64,
    low: tl.float32,
    high: tl.float32,
    actions_ptr,
    logprobs_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        at = row[:, None]
        mean = _load(mean_ptr, mean_stride_b, mean_stride_a, at, column, inside)
        log_std = _load(log_std_ptr, log_std_stride_b, log_std_stride_a, at, column, inside)
        noise = _load(noise_ptr, noise_stride_b, noise_stride_a, at, column, inside)
        s, _, magnitude, e, action = _sample(mean, log_std, noise, low, high)
        log_slope = 2.0 * (LN_2 - magnitude - log1p(e))
        logprob = -0.5 * noise * noise - s - HALF_LOG_2_PI - log_slope
        sums += tl.where(inside, logprob, 0.0)
        tl.store(actions_ptr + at * columns + column, action, mask=inside)
    tl.store(logprobs_ptr + row, tl.sum(sums, 1), mask=row < rows)


@kernel()
def _squashed_gaussian_bwd_kernel(
    rows: tl.int64,
    columns: tl.int64,
    mean_ptr,
    mean_stride_b: tl.int64,
    mean_stride_a: tl.int64,
    log_std_ptr,
    log_std_stride_b: tl.int64,
    log_std_stride_a: tl.int64,
    noise_ptr,
    noise_stride_b: tl.int64,
    noise_stride_a: tl.int64,
    low: tl.float32,
    high: tl.float32,
    grad_actions_ptr,
    grad_actions_stride_b: tl.int64,
    grad_actions_stride_a: tl.int64,
    grad_logprobs_ptr,
    grad_logprobs_stride: tl.int64,
    grad_mean_ptr,
    grad_log_std_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_row = tl.zeros([ROWS], tl.float32)
    if grad_logprobs_ptr is not None:
        of_row = tl.load(grad_logprobs_ptr + row * grad_logprobs_stride, mask=row < rows, other=0)
    for start in range(0, columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        at = row[:, None]
        mean = _load(mean_ptr, mean_stride_b, mean_stride_a, at, column, inside)
        log_std = _load(log_std_ptr, log_std_stride_b, log_std_stride_a, at, column, inside)
        noise = _load(noise_ptr, noise_stride_b, noise_stride_a, at, column, inside)
        _, spread, _, e, action = _sample(mean, log_std, noise, low, high)
        grad_u = of_row[:, None] * 2.0 * action
        if grad_actions_ptr is not None:
            half = 1.0 / (1.0 + e)
            grad_u += (
                4.0
                * e
                * half
                * half
                * _load(
                    grad_actions_ptr,
                    grad_actions_stride_b,
                    grad_actions_stride_a,
                    at,
                    column,
                    inside,
                )
            )
        clamped = ~((log_std >= low) & (log_std <= high))
        grad_s = tl.where(clamped, 0.0, grad_u * spread - of_row[:, None])
        tl.store(grad_mean_ptr + at * columns + column, grad_u, mask=inside)
        tl.store(grad_log_std_ptr + at * columns + column, grad_s, mask=inside)


def squashed_gaussian_forward(a: SquashedGaussianArguments) -> None:
    if a.rows == 0:
        return
    with torch.cuda.device_of(a.mean):
        _squashed_gaussian_fwd_kernel[(triton.cdiv(a.rows, ROWS),)](
            *_inputs(a),
            a.actions,
            a.logprobs,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def _inputs(a: SquashedGaussianArguments) -> tuple:
    """The parameters that both kernels begin with."""
    tensors = (*strided(a.mean), *strided(a.log_std), *strided(a.noise))
    return (a.rows, a.columns, *tensors, float(a.log_std_min), float(a.log_std_max))


def squashed_gaussian_backward(a: SquashedGaussianBackwardArguments) -> None:
    rows = a.forward.rows
    if rows == 0:
        return
    _, _, grad_logprobs_stride = strided(a.grad_logprobs)
    with torch.cuda.device_of(a.grad_mean):
        _squashed_gaussian_bwd_kernel[(triton.cdiv(rows, ROWS),)](
            *_inputs(a.forward),
            *strided(a.grad_actions),
            a.grad_logprobs,
            grad_logprobs_stride,
            a.grad_mean,
            a.grad_log_std,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
