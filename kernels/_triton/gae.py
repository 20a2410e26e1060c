"""Generalised advantage estimation, and its adjoint as a scan forward in time."""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.gae import GaeArguments, GaeBackwardArguments
from warpo.kernels._triton.launch import column, kernel, strided
from warpo.kernels._triton.reverse_scan import COMPACT, ZERO, reverse_scan
from warpo.kernels._triton.scan import (
    at,
    bounds,
    choose_tile,
    ends,
    flags_and_ends,
    is_kept,
    load,
    poison_if,
    scan,
    store,
    zero_outside,
)


def gae_forward(a: GaeArguments) -> None:
    reverse_scan(a)


@triton.jit
def _last_kept(
    mask_ptr,
    mask_stride_b,
    mask_stride_t,
    row,
    start,
    length,
    row_inside,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    """The last valid step of each row, -1 where there is none."""
    last = tl.full([BLOCK_B], -1, tl.int64)
    for first in range(0, length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        step = tl.expand_dims(t, 1 - TIME_AXIS)
        keep = is_kept(
            mask_ptr,
            row,
            start + t,
            mask_stride_b,
            mask_stride_t,
            row_inside & (step < length),
            TIME_AXIS,
            DENSE,
        )
        last = tl.maximum(last, tl.max(tl.where(keep, step, -1), TIME_AXIS))
    return last


@triton.jit
def _sum_of(
    first_ptr,
    first_stride_b,
    first_stride_t,
    second_ptr,
    second_stride_b,
    second_stride_t,
    row,
    step,
    keep,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Two upstream gradients added up, and the second of them."""
    first = load(first_ptr, row, step, first_stride_b, first_stride_t, keep, TIME_AXIS, DENSE)
    second = load(second_ptr, row, step, second_stride_b, second_stride_t, keep, TIME_AXIS, DENSE)
    return first + second, second


@kernel()
def _gae_bwd_kernel(
    cu_seqlens_ptr,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    terminated_ptr,
    terminated_stride_b: tl.int64,
    terminated_stride_t: tl.int64,
    truncated_ptr,
    truncated_stride_b: tl.int64,
    truncated_stride_t: tl.int64,
    last_terminated_ptr,
    last_terminated_stride: tl.int64,
    last_truncated_ptr,
    last_truncated_stride: tl.int64,
    gamma: tl.float32,
    gae_lambda: tl.float32,
    rows: tl.int64,
    steps: tl.int64,
    grad_advantages_ptr,
    grad_advantages_stride_b: tl.int64,
    grad_advantages_stride_t: tl.int64,
    grad_returns_ptr,
    grad_returns_stride_b: tl.int64,
    grad_returns_stride_t: tl.int64,
    grad_rewards_ptr,
    grad_rewards_stride_b: tl.int64,
    grad_rewards_stride_t: tl.int64,
    grad_values_ptr,
    grad_values_stride_b: tl.int64,
    grad_values_stride_t: tl.int64,
    grad_last_values_ptr,
    grad_last_values_stride: tl.int64,
    grad_final_values_ptr,
    grad_final_values_stride_b: tl.int64,
    grad_final_values_stride_t: tl.int64,
    MASK_MODE: tl.constexpr,
    STARTS_AT_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_inside = tl.expand_dims(row < rows, TIME_AXIS)
    start, length, malformed = bounds(cu_seqlens_ptr, rows, steps)
    zero_outside(grad_rewards_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK_T)
    zero_outside(grad_values_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK_T)
    zero_outside(grad_final_values_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK_T)
    decay = gamma * gae_lambda
    moves_tail: tl.constexpr = MASK_MODE == COMPACT and mask_ptr is not None
    if moves_tail:
        last = _last_kept(
            mask_ptr,
            mask_stride_b,
            mask_stride_t,
            row,
            start,
            length,
            row_inside,
            BLOCK_B,
            BLOCK_T,
            TIME_AXIS,
            DENSE,
        )
        last = tl.expand_dims(last, TIME_AXIS)
        last_total = tl.zeros([BLOCK_B], tl.float32)
    # adjoint of A at the step before, 0 where its episode ended there: a step receives it times
    # decay through the trace and times gamma through its value
    state = tl.zeros([BLOCK_B], tl.float32)
    last_adjoint = tl.zeros([BLOCK_B], tl.float32)
    # one position more than steps, for the value after the last
    for first in range(0, length + 1, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        step = start + t
        inside = row_inside & tl.expand_dims(t < length, 1 - TIME_AXIS)
        before_inside = row_inside & tl.expand_dims((t > 0) & (t <= length), 1 - TIME_AXIS)
        keep = is_kept(mask_ptr, row, step, mask_stride_b, mask_stride_t, inside, TIME_AXIS, DENSE)
        before_keep = is_kept(
            mask_ptr, row, step - 1, mask_stride_b, mask_stride_t, before_inside, TIME_AXIS, DENSE
        )
        grad, grad_return = _sum_of(
            grad_advantages_ptr,
            grad_advantages_stride_b,
            grad_advantages_stride_t,
            grad_returns_ptr,
            grad_returns_stride_b,
            grad_returns_stride_t,
            row,
            step,
            keep,
            TIME_AXIS,
            DENSE,
        )
        before_grad, _ = _sum_of(
            grad_advantages_ptr,
            grad_advantages_stride_b,
            grad_advantages_stride_t,
            grad_returns_ptr,
            grad_returns_stride_b,
            grad_returns_stride_t,
            row,
            step - 1,
            before_keep,
            TIME_AXIS,
            DENSE,
        )
        ended = ends(
            terminated_ptr,
            terminated_stride_b,
            terminated_stride_t,
            last_terminated_ptr,
            last_terminated_stride,
            row,
            start,
            t - 1,
            rows,
            length,
            before_keep,
            STARTS_AT_T,
            TIME_AXIS,
            DENSE,
        ) | ends(
            truncated_ptr,
            truncated_stride_b,
            truncated_stride_t,
            last_truncated_ptr,
            last_truncated_stride,
            row,
            start,
            t - 1,
            rows,
            length,
            before_keep,
            STARTS_AT_T,
            TIME_AXIS,
            DENSE,
        )
        counts = before_inside if MASK_MODE == ZERO else before_keep
        c = tl.where(counts, tl.where(ended, 0.0, decay), 1.0)
        adjoint = scan(c, tl.where(ended, 0.0, before_grad), state, TIME_AXIS)
        is_last = tl.expand_dims(t == first + BLOCK_T - 1, 1 - TIME_AXIS)
        state = at(adjoint, is_last, TIME_AXIS)

        total = grad + decay * adjoint
        grad_reward = tl.where(keep, total, 0.0)
        if moves_tail:
            # the rewards behind the last valid step went into its own
            position = tl.expand_dims(t, 1 - TIME_AXIS)
            last_total += at(total, keep & (position == last), TIME_AXIS)
            behind = tl.expand_dims(last_total, TIME_AXIS)
            grad_reward = tl.where((position > last) & (last >= 0), behind, grad_reward)
        store(
            grad_rewards_ptr,
            row,
            step,
            grad_rewards_stride_b,
            grad_rewards_stride_t,
            poison_if(malformed, grad_reward, cu_seqlens_ptr),
            inside,
            TIME_AXIS,
            DENSE,
        )
        grad_value = grad_return - total + gamma * adjoint
        store(
            grad_values_ptr,
            row,
            step,
            grad_values_stride_b,
            grad_values_stride_t,
            poison_if(malformed, tl.where(keep, grad_value, 0.0), cu_seqlens_ptr),
            inside,
            TIME_AXIS,
            DENSE,
        )
        if grad_final_values_ptr is not None:
            terminal = ends(
                terminated_ptr,
                terminated_stride_b,
                terminated_stride_t,
                last_terminated_ptr,
                last_terminated_stride,
                row,
                start,
                t,
                rows,
                length,
                keep,
                STARTS_AT_T,
                TIME_AXIS,
                DENSE,
            )
            cut = ends(
                truncated_ptr,
                truncated_stride_b,
                truncated_stride_t,
                last_truncated_ptr,
                last_truncated_stride,
                row,
                start,
                t,
                rows,
                length,
                keep,
                STARTS_AT_T,
                TIME_AXIS,
                DENSE,
            )
            store(
                grad_final_values_ptr,
                row,
                step,
                grad_final_values_stride_b,
                grad_final_values_stride_t,
                poison_if(malformed, tl.where(cut & ~terminal, gamma * total, 0.0), cu_seqlens_ptr),
                inside,
                TIME_AXIS,
                DENSE,
            )
        # nothing but in the tile that holds the position after the last step
        after = tl.expand_dims(t == length, 1 - TIME_AXIS)
        last_adjoint += at(adjoint, after, TIME_AXIS)
    if grad_last_values_ptr is not None:
        where = grad_last_values_ptr + row * grad_last_values_stride
        last = poison_if(malformed, gamma * last_adjoint, cu_seqlens_ptr)
        tl.store(where, last, mask=row < rows)


def gae_backward(a: GaeBackwardArguments) -> None:
    """The recursion is linear: rewards and values are not needed."""
    f = a.forward
    if f.rows * f.steps == 0:
        return
    gradients = (a.grad_rewards, a.grad_values, a.grad_advantages, a.grad_returns)
    per_step = (*gradients, a.grad_final_values)
    programs, tile = choose_tile(f, *per_step, f.scan.mask, f.scan.terminated, f.scan.truncated)
    with torch.cuda.device_of(next(x for x in per_step if x is not None)):
        _gae_bwd_kernel[(programs,)](
            f.scan.cu_seqlens,
            *flags_and_ends(f),
            float(f.scan.gamma),
            float(f.scan.gae_lambda),
            f.rows,
            f.steps,
            *strided(a.grad_advantages),
            *strided(a.grad_returns),
            *strided(a.grad_rewards),
            *strided(a.grad_values),
            *column(a.grad_last_values),
            *strided(a.grad_final_values),
            MASK_MODE=f.scan.mask_mode,
            STARTS_AT_T=f.scan.starts_at_t,
            **tile,
            enable_fp_fusion=True,
        )
