"""The reverse scan behind gae and its relatives: one kernel, by which tensors there are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.gae import GaeArguments
from warpo.kernels._triton.launch import column, kernel, strided
from warpo.kernels._triton.policy_terms import clamp, exp, kl_estimate
from warpo.kernels._triton.scan import (
    LONG_ROWS,
    LONG_ROWS_RATIOS,
    at,
    bounds,
    choose_tile,
    ends,
    flags_and_ends,
    is_kept,
    load,
    poison_if,
    scan,
    scan_with_before,
    store,
    zero_outside,
)

ZERO, COMPACT = tl.constexpr(1), tl.constexpr(2)  # MaskMode


@triton.jit
def _add_terminal(
    reward,
    keep,
    t,
    pending,
    ended,
    terminal_ptr,
    terminal_stride,
    row,
    rows,
    TIME_AXIS: tl.constexpr,
    MOVES_TAIL: tl.constexpr,
):
    """Adds to the last valid step of a row its terminal reward and, with MOVES_TAIL, the
    rewards behind it; `pending` is their sum and `ended` is 1 once that step is found.
    """
    step = tl.expand_dims(t, 1 - TIME_AXIS)
    last = tl.max(tl.where(keep, step, -1), TIME_AXIS)
    searched = tl.expand_dims(ended, TIME_AXIS) == 0
    if MOVES_TAIL:
        behind = searched & (step > tl.expand_dims(last, TIME_AXIS))
        pending += tl.sum(tl.where(behind, reward, 0.0), TIME_AXIS)
    extra = pending
    if terminal_ptr is not None:
        terminal = tl.load(terminal_ptr + row * terminal_stride, mask=row < rows, other=0)
        extra += terminal.to(tl.float32)
    here = searched & keep & (step == tl.expand_dims(last, TIME_AXIS))
    reward += tl.where(here, tl.expand_dims(extra, TIME_AXIS), 0.0)
    return reward, pending, tl.maximum(ended, tl.where(last >= 0, 1, 0))


@kernel()
def _reverse_scan_kernel(
    cu_seqlens_ptr,
    rewards_ptr,
    rewards_stride_b: tl.int64,
    rewards_stride_t: tl.int64,
    terminal_ptr,
    terminal_stride: tl.int64,
    values_ptr,
    values_stride_b: tl.int64,
    values_stride_t: tl.int64,
    last_values_ptr,
    last_values_stride: tl.int64,
    final_values_ptr,
    final_values_stride_b: tl.int64,
    final_values_stride_t: tl.int64,
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
    advantages_ptr,
    advantages_stride_b: tl.int64,
    advantages_stride_t: tl.int64,
    returns_ptr,
    returns_stride_b: tl.int64,
    returns_stride_t: tl.int64,
    logprobs_ptr,
    logprobs_stride_b: tl.int64,
    logprobs_stride_t: tl.int64,
    # of the reference where KL, else of the policy that took the steps
    other_ptr,
    other_stride_b: tl.int64,
    other_stride_t: tl.int64,
    log_ratio_limit: tl.float32,
    kl_coef: tl.float32,
    kl_coef_ptr,
    entropy_coef: tl.float32,
    shaped_ptr,
    shaped_stride_b: tl.int64,
    shaped_stride_t: tl.int64,
    rho_max: tl.float32,
    c_max: tl.float32,
    pg_rho_max: tl.float32,
    MASK_MODE: tl.constexpr,
    STARTS_AT_T: tl.constexpr,
    KL: tl.constexpr,
    WEIGHS_ADVANTAGES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_inside = tl.expand_dims(row < rows, TIME_AXIS)
    start, length, malformed = bounds(cu_seqlens_ptr, rows, steps)
    zero_outside(advantages_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK_T)
    zero_outside(returns_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK_T)
    zero_outside(shaped_ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK_T)
    decay = gamma * gae_lambda
    moves_tail: tl.constexpr = MASK_MODE == COMPACT and mask_ptr is not None
    state = tl.zeros([BLOCK_B], tl.float32)
    pending = tl.zeros([BLOCK_B], tl.float32)
    ended = tl.zeros([BLOCK_B], tl.int32)
    # value of the first valid step after the tile
    next_valid = tl.zeros([BLOCK_B], tl.float32)
    if last_values_ptr is not None:
        last_values = last_values_ptr + row * last_values_stride
        next_valid = tl.load(last_values, mask=row < rows, other=0).to(tl.float32)
    if kl_coef_ptr is not None:
        kl_coef = tl.load(kl_coef_ptr)

    tiles = tl.cdiv(length, BLOCK_T)
    for tile in range(tiles):
        first = (tiles - 1 - tile) * BLOCK_T
        # against time: a reversed scan would cost shuffles
        t = first + BLOCK_T - 1 - tl.arange(0, BLOCK_T)
        step = start + t
        is_first = tl.expand_dims(t == first, 1 - TIME_AXIS)
        inside = row_inside & tl.expand_dims(t < length, 1 - TIME_AXIS)
        next_inside = row_inside & tl.expand_dims(t + 1 < length, 1 - TIME_AXIS)
        keep = is_kept(mask_ptr, row, step, mask_stride_b, mask_stride_t, inside, TIME_AXIS, DENSE)
        next_keep = is_kept(
            mask_ptr, row, step + 1, mask_stride_b, mask_stride_t, next_inside, TIME_AXIS, DENSE
        )
        reward = load(
            rewards_ptr,
            row,
            step,
            rewards_stride_b,
            rewards_stride_t,
            inside if moves_tail else keep,
            TIME_AXIS,
            DENSE,
        )
        if terminal_ptr is not None or moves_tail:
            reward, pending, ended = _add_terminal(
                reward,
                keep,
                t,
                pending,
                ended,
                terminal_ptr,
                terminal_stride,
                row,
                rows,
                TIME_AXIS,
                moves_tail,
            )
        reward = tl.where(keep, reward, 0.0)
        value = load(
            values_ptr, row, step, values_stride_b, values_stride_t, keep, TIME_AXIS, DENSE
        )
        next_value = load(
            values_ptr, row, step + 1, values_stride_b, values_stride_t, next_keep, TIME_AXIS, DENSE
        )
        if MASK_MODE != ZERO and mask_ptr is not None:
            passes = tl.where(next_keep, 0.0, 1.0)
            next_value = scan(passes, next_value, next_valid, TIME_AXIS)
        else:
            after = tl.expand_dims(next_valid, TIME_AXIS)
            next_value = tl.where(next_inside, next_value, after)
        next_valid = at(next_value, is_first, TIME_AXIS)

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
        if final_values_ptr is not None:
            final_value = load(
                final_values_ptr,
                row,
                step,
                final_values_stride_b,
                final_values_stride_t,
                cut,
                TIME_AXIS,
                DENSE,
            )
            next_value = tl.where(cut, final_value, next_value)
        if KL:
            logp = load(
                logprobs_ptr,
                row,
                step,
                logprobs_stride_b,
                logprobs_stride_t,
                keep,
                TIME_AXIS,
                DENSE,
            )
            ref = load(other_ptr, row, step, other_stride_b, other_stride_t, keep, TIME_AXIS, DENSE)
            kl, _ = kl_estimate(logp, ref, log_ratio_limit, KL, False)
            reward -= tl.where(keep, kl_coef * kl, 0.0)
            # 0 times a logprob of -inf would be NaN
            reward -= tl.where(keep & (entropy_coef != 0), entropy_coef * logp, 0.0)
            store(
                shaped_ptr,
                row,
                step,
                shaped_stride_b,
                shaped_stride_t,
                poison_if(malformed, reward, cu_seqlens_ptr),
                inside,
                TIME_AXIS,
                DENSE,
            )
        delta = reward + gamma * tl.where(terminal, 0.0, next_value) - value
        # outside the row, and where a mask carries: the identity
        counts = inside if MASK_MODE == ZERO else keep
        cut |= terminal
        c = tl.where(cut, 0.0, decay)
        if logprobs_ptr is not None and KL == 0:
            logp = load(
                logprobs_ptr,
                row,
                step,
                logprobs_stride_b,
                logprobs_stride_t,
                keep,
                TIME_AXIS,
                DENSE,
            )
            old = load(other_ptr, row, step, other_stride_b, other_stride_t, keep, TIME_AXIS, DENSE)
            ratio = exp(clamp(logp - old, -log_ratio_limit, log_ratio_limit))
            # 1 where a mask counts zeros
            c = tl.where(counts, c * tl.where(ratio > c_max, c_max, ratio), 1.0)
            rho = tl.where(ratio > rho_max, rho_max, ratio)
            x, after = scan_with_before(c, tl.where(counts, rho * delta, 0.0), state, TIME_AXIS)
            state = at(x, is_first, TIME_AXIS)
            advantage = delta + gamma * tl.where(cut, 0.0, after)
            if WEIGHS_ADVANTAGES:
                advantage *= tl.where(ratio > pg_rho_max, pg_rho_max, ratio)
        else:
            c = tl.where(counts, c, 1.0)
            x = scan(c, tl.where(counts, delta, 0.0), state, TIME_AXIS)
            state = at(x, is_first, TIME_AXIS)
            advantage = x
        store(
            advantages_ptr,
            row,
            step,
            advantages_stride_b,
            advantages_stride_t,
            poison_if(malformed, tl.where(keep, advantage, 0.0), cu_seqlens_ptr),
            inside,
            TIME_AXIS,
            DENSE,
        )
        store(
            returns_ptr,
            row,
            step,
            returns_stride_b,
            returns_stride_t,
            poison_if(malformed, tl.where(keep, x + value, 0.0), cu_seqlens_ptr),
            inside,
            TIME_AXIS,
            DENSE,
        )


def reverse_scan(
    a: GaeArguments,
    *,
    logprobs: Tensor | None = None,
    other_logprobs: Tensor | None = None,
    kl: int = 0,
    log_ratio_limit: float = 0.0,
    kl_coef: float = 0.0,
    adaptive_kl_coef: Tensor | None = None,
    entropy_coef: float = 0.0,
    shaped_rewards: Tensor | None = None,
    ratio_bounds: tuple[float, float, float] = (1.0, 1.0, 1.0),
    weighs_advantages: bool = True,
) -> None:
    """Of `Gae`, and what shaped_gae and vtrace have beyond."""
    if a.rows * a.steps == 0:
        return
    results = (a.advantages, a.returns)
    given = (a.rewards, a.values, a.final_values, a.scan.mask, a.scan.terminated, a.scan.truncated)
    policies = (logprobs, other_logprobs, shaped_rewards)
    long_rows = LONG_ROWS if logprobs is None or kl else LONG_ROWS_RATIOS
    programs, tile = choose_tile(a, *results, *given, *policies, long_rows=long_rows)
    with torch.cuda.device_of(a.returns if a.advantages is None else a.advantages):
        _reverse_scan_kernel[(programs,)](
            a.scan.cu_seqlens,
            *strided(a.rewards),
            *column(a.terminal_rewards),
            *strided(a.values),
            *column(a.last_values),
            *strided(a.final_values),
            *flags_and_ends(a),
            float(a.scan.gamma),
            float(a.scan.gae_lambda),
            a.rows,
            a.steps,
            *strided(a.advantages),
            *strided(a.returns),
            *strided(logprobs),
            *strided(other_logprobs),
            float(log_ratio_limit),
            float(kl_coef),
            adaptive_kl_coef,
            float(entropy_coef),
            *strided(shaped_rewards),
            *map(float, ratio_bounds),
            MASK_MODE=a.scan.mask_mode,
            STARTS_AT_T=a.scan.starts_at_t,
            KL=kl,
            WEIGHS_ADVANTAGES=weighs_advantages,
            **tile,
            enable_fp_fusion=True,
        )
