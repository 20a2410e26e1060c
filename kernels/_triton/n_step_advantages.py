"""Advantages of n steps: each step walks to the steps after it, which lie in the caches."""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.gae import NStepAdvantagesArguments
from warpo.kernels._triton.launch import column, kernel, strided
from warpo.kernels._triton.reverse_scan import COMPACT, ZERO
from warpo.kernels._triton.scan import bounds, poison_if, zero_outside

BLOCK = 256
WARPS = 4


@triton.jit
def _load(ptr, stride, step, inside):
    return tl.load(ptr + step * stride, mask=inside, other=0).to(tl.float32)


@triton.jit
def _is_kept(mask_ptr, stride, step, inside):
    keep = inside
    if mask_ptr is not None:
        keep &= tl.load(mask_ptr + step * stride, mask=inside, other=0) != 0
    return keep


@kernel()
def _n_step_advantages_fwd_kernel(
    cu_seqlens_ptr,
    rewards_ptr,
    rewards_stride_b: tl.int64,
    rewards_stride_t: tl.int64,
    values_ptr,
    values_stride_b: tl.int64,
    values_stride_t: tl.int64,
    last_values_ptr,
    last_values_stride: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    gamma: tl.float32,
    n: tl.int64,
    rows: tl.int64,
    steps: tl.int64,
    advantages_ptr,
    advantages_stride_b: tl.int64,
    advantages_stride_t: tl.int64,
    returns_ptr,
    returns_stride_b: tl.int64,
    returns_stride_t: tl.int64,
    MASK_MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, length, malformed = bounds(cu_seqlens_ptr, rows, steps)
    zero_outside(advantages_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK)
    zero_outside(returns_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK)
    rewards_ptr += row * rewards_stride_b
    values_ptr += row * values_stride_b
    if mask_ptr is not None:
        mask_ptr += row * mask_stride_b
    last_value = 0.0
    if last_values_ptr is not None:
        last_value = tl.load(last_values_ptr + row * last_values_stride).to(tl.float32)
    # nothing behind a discount of 0 is read
    wanted = tl.where(gamma == 0, 1, n)
    end = start + length
    for first in range(0, length, BLOCK):
        step = start + first + tl.arange(0, BLOCK)
        inside = step < end
        own = _is_kept(mask_ptr, mask_stride_t, step, inside)
        total = tl.zeros([BLOCK], tl.float32)
        decay, weight = total + 1.0, total + 1.0
        tail, bootstrap = total, total + last_value
        counted = tl.zeros([BLOCK], tl.int64)
        walks = own
        at = step
        while tl.max(walks.to(tl.int32)) > 0:
            here = walks & (at < end)
            keep = _is_kept(mask_ptr, mask_stride_t, at, here)
            counts = here if MASK_MODE == ZERO else keep
            is_behind = counts & (counted == wanted)
            value = _load(values_ptr, values_stride_t, at, is_behind & keep & (gamma != 0))
            bootstrap = tl.where(is_behind, value, bootstrap)
            counts &= ~is_behind
            if MASK_MODE == COMPACT:
                tail += _load(rewards_ptr, rewards_stride_t, at, here & ~keep)
                tail = tl.where(keep, 0.0, tail)
            total += decay * _load(rewards_ptr, rewards_stride_t, at, counts & keep)
            weight = tl.where(counts, decay, weight)
            decay = tl.where(counts, decay * gamma, decay)
            counted += counts.to(tl.int64)
            walks = here & ~is_behind
            at += 1
        if MASK_MODE == COMPACT:
            total += weight * tail
        total += tl.where(decay == 0, 0.0, decay * bootstrap)
        found = poison_if(malformed, tl.where(own, total, 0.0), cu_seqlens_ptr)
        value = _load(values_ptr, values_stride_t, step, own)
        tl.store(returns_ptr + row * returns_stride_b + step * returns_stride_t, found, mask=inside)
        where = advantages_ptr + row * advantages_stride_b + step * advantages_stride_t
        tl.store(where, found - value, mask=inside)


def n_step_advantages(s: NStepAdvantagesArguments) -> None:
    a = s.gae
    if a.rows * a.steps == 0:
        return
    with torch.cuda.device_of(a.advantages):
        _n_step_advantages_fwd_kernel[(a.rows,)](
            a.scan.cu_seqlens,
            *strided(a.rewards),
            *strided(a.values),
            *column(a.last_values),
            *strided(a.scan.mask),
            float(a.scan.gamma),
            s.n,
            a.rows,
            a.steps,
            *strided(a.advantages),
            *strided(a.returns),
            MASK_MODE=a.scan.mask_mode,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
