"""Estimators of the KL of each token, and their gradient: a program a block of tokens.

The formulas are those of `csrc/math/approx_kl.h`.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.approx_kl import ApproxKlArguments, ApproxKlBackwardArguments
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.policy_terms import (
    K1,
    K2,
    REVERSE_K3,
    clamp,
    exponential_of,
    is_outside,
    reverse_k3,
)

BLOCK = 512
WARPS = 4
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _approx_kl(logp, ref, ESTIMATOR: tl.constexpr):
    """Value before the clamp, and its derivative with respect to logp."""
    d = ref - logp
    if ESTIMATOR == K1:
        value, derivative = -d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == K2:
        value, derivative = 0.5 * d * d, -d
    elif ESTIMATOR == REVERSE_K3:
        value, derivative = reverse_k3(tl.where(d > 89.0, 89.0, d))
    else:
        # inf where e^d overflows, also at d = inf; near 0 all digits of the difference matter
        _, growth, value = exponential_of(tl.where(d > 89.0, 89.0, d))
        derivative = -growth
    return value, derivative


@triton.jit
def _own_tokens(rows, columns, mask_ptr, mask_stride_b, mask_stride_t, BLOCK: tl.constexpr):
    """Index, row, column, which are inside, and which of those are valid."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows * columns
    row = index // columns
    column = index - row * columns
    keep = inside
    if mask_ptr is not None:
        flags = mask_ptr + row * mask_stride_b + column * mask_stride_t
        keep &= tl.load(flags, mask=inside, other=0) != 0
    return index, row, column, inside, keep


@triton.jit
def _load(ptr, row, column, stride_b, stride_t, keep):
    return tl.load(ptr + row * stride_b + column * stride_t, mask=keep, other=0).to(tl.float32)


@kernel()
def _approx_kl_fwd_kernel(
    rows: tl.int64,
    columns: tl.int64,
    logp_ptr,
    logp_stride_b: tl.int64,
    logp_stride_t: tl.int64,
    ref_ptr,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    limit: tl.float32,
    kl_ptr,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, row, column, inside, keep = _own_tokens(
        rows, columns, mask_ptr, mask_stride_b, mask_stride_t, BLOCK
    )
    logp = _load(logp_ptr, row, column, logp_stride_b, logp_stride_t, keep)
    ref = _load(ref_ptr, row, column, ref_stride_b, ref_stride_t, keep)
    value, _ = _approx_kl(logp, ref, ESTIMATOR)
    tl.store(kl_ptr + index, tl.where(keep, clamp(value, -limit, limit), 0.0), mask=inside)


@kernel()
def _approx_kl_bwd_kernel(
    rows: tl.int64,
    columns: tl.int64,
    logp_ptr,
    logp_stride_b: tl.int64,
    logp_stride_t: tl.int64,
    ref_ptr,
    ref_stride_b: tl.int64,
    ref_stride_t: tl.int64,
    weight_ptr,
    weight_stride_b: tl.int64,
    weight_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    grad_ptr,
    grad_stride_b: tl.int64,
    grad_stride_t: tl.int64,
    limit: tl.float32,
    grad_logprobs_ptr,
    grad_ref_ptr,
    ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, row, column, inside, keep = _own_tokens(
        rows, columns, mask_ptr, mask_stride_b, mask_stride_t, BLOCK
    )
    logp = _load(logp_ptr, row, column, logp_stride_b, logp_stride_t, keep)
    ref = _load(ref_ptr, row, column, ref_stride_b, ref_stride_t, keep)
    if STRAIGHT_THROUGH:
        grad = logp - ref
        if weight_ptr is not None:
            grad *= _load(weight_ptr, row, column, weight_stride_b, weight_stride_t, keep)
    else:
        value, derivative = _approx_kl(logp, ref, ESTIMATOR)
        outside = is_outside(value, tl.minimum(limit, LARGEST))
        grad = tl.where(outside, 0.0, derivative)
    grad *= _load(grad_ptr, row, column, grad_stride_b, grad_stride_t, keep)
    grad = tl.where(keep, grad, 0.0)
    if grad_logprobs_ptr is not None:
        tl.store(grad_logprobs_ptr + index, grad, mask=inside)
    if grad_ref_ptr is not None:
        tl.store(grad_ref_ptr + index, -grad, mask=inside)


def approx_kl_forward(a: ApproxKlArguments) -> None:
    if a.rows * a.columns == 0:
        return
    with torch.cuda.device_of(a.logprobs):
        _approx_kl_fwd_kernel[(triton.cdiv(a.rows * a.columns, BLOCK),)](
            a.rows,
            a.columns,
            *strided(a.logprobs),
            *strided(a.ref_logprobs),
            *strided(a.mask),
            float(a.limit),
            a.kl,
            ESTIMATOR=a.estimator,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def approx_kl_backward(a: ApproxKlBackwardArguments) -> None:
    if a.rows * a.columns == 0:
        return
    with torch.cuda.device_of(a.logprobs):
        _approx_kl_bwd_kernel[(triton.cdiv(a.rows * a.columns, BLOCK),)](
            a.rows,
            a.columns,
            *strided(a.logprobs),
            *strided(a.ref_logprobs),
            *strided(a.weight),
            *strided(a.mask),
            *strided(a.grad_kl),
            float(a.limit),
            a.grad_logprobs,
            a.grad_ref,
            ESTIMATOR=a.estimator,
            STRAIGHT_THROUGH=a.straight_through,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
