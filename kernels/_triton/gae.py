"""Generalised advantage estimation as a scan of affine maps, along time in the backward pass.

Every step is a map A_t = c A_{t+1} + b, and maps compose. A program walks its rows tile by tile,
scans each tile and carries the state across; the order of the sums depends on the number of steps
alone. One kernel serves both layouts: the tile is [rows, time] or [time, rows], whichever has the
fast dimension last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import column, kernel, strided

# (rows, steps) of a tile and its warps, for rows dense in time and for steps dense in rows. The
# short tile keeps threads busy where a row is shorter than the long one. Larger tiles spill
# registers on some of sm_80, sm_90 and sm_100, see tests/kernels/test_triton_compile.py.
SHORT_ROWS = (2, 128, 4)
LONG_ROWS = (1, 1024, 8)
DENSE_STEPS = (32, 8, 1)
DENSE_STEPS_BACKWARD = (32, 4, 1)


@triton.jit
def _compose(c_first, b_first, c_then, b_then):
    """The map x -> c_then (c_first x + b_first) + b_then; c_then = 0 also stops NaN and inf."""
    return c_then * c_first, tl.where(c_then == 0, b_then, b_then + c_then * b_first)


@triton.jit
def _scan(c, b, state, TIME_AXIS: tl.constexpr):
    """Images of `state` under the maps of a tile, composed in its order."""
    c, b = tl.associative_scan((c, b), TIME_AXIS, _compose)
    return tl.where(c == 0, b, b + c * tl.expand_dims(state, TIME_AXIS))


@triton.jit
def _at(tile, chosen, TIME_AXIS: tl.constexpr):
    """The one value of each row that is chosen along time."""
    return tl.sum(tl.where(chosen, tile, 0.0), TIME_AXIS)


@triton.jit
def _pointers(
    ptr, row, step, stride_row, stride_step, TIME_AXIS: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    # DENSE tells the compiler where neighbours in memory are, so that it puts threads there
    rows = row if DENSE and TIME_AXIS == 0 else row * stride_row
    steps = step if DENSE and TIME_AXIS == 1 else step * stride_step
    return ptr + tl.expand_dims(rows, TIME_AXIS) + tl.expand_dims(steps, 1 - TIME_AXIS)


@triton.jit
def _ends(
    ptr, stride_row, stride_step, last_ptr, last_stride, row, step, rows, steps, keep,
    STARTS_AT_T: tl.constexpr, TIME_AXIS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Whether an episode ends at each kept step; under STARTS_AT_T the flag of the next step."""
    if ptr is None:
        ends = keep & False
    elif STARTS_AT_T:
        is_last = tl.expand_dims(step + 1 >= steps, 1 - TIME_AXIS)
        pointers = _pointers(ptr, row, step + 1, stride_row, stride_step, TIME_AXIS, DENSE)
        ends = tl.load(pointers, mask=keep & ~is_last, other=0) != 0
        if last_ptr is not None:
            last = tl.load(last_ptr + row * last_stride, mask=row < rows, other=0) != 0
            ends |= keep & is_last & tl.expand_dims(last, TIME_AXIS)
    else:
        pointers = _pointers(ptr, row, step, stride_row, stride_step, TIME_AXIS, DENSE)
        ends = tl.load(pointers, mask=keep, other=0) != 0
    return ends


@kernel()
def _gae_fwd_kernel(
    rewards_ptr, rewards_stride_b: tl.int64, rewards_stride_t: tl.int64,
    values_ptr, values_stride_b: tl.int64, values_stride_t: tl.int64,
    last_values_ptr, last_values_stride: tl.int64,
    final_values_ptr, final_values_stride_b: tl.int64, final_values_stride_t: tl.int64,
    mask_ptr, mask_stride_b: tl.int64, mask_stride_t: tl.int64,
    terminated_ptr, terminated_stride_b: tl.int64, terminated_stride_t: tl.int64,
    truncated_ptr, truncated_stride_b: tl.int64, truncated_stride_t: tl.int64,
    last_terminated_ptr, last_terminated_stride: tl.int64,
    last_truncated_ptr, last_truncated_stride: tl.int64,
    gamma: tl.float32, gae_lambda: tl.float32, rows: tl.int64, steps: tl.int64,
    advantages_ptr, advantages_stride_b: tl.int64, advantages_stride_t: tl.int64,
    returns_ptr, returns_stride_b: tl.int64, returns_stride_t: tl.int64,
    CARRY: tl.constexpr, STARTS_AT_T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, TIME_AXIS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_inside = tl.expand_dims(row < rows, TIME_AXIS)
    decay = gamma * gae_lambda
    state = tl.zeros([BLOCK_B], tl.float32)
    # value of the first valid step after the tile
    next_valid = tl.zeros([BLOCK_B], tl.float32)
    if last_values_ptr is not None:
        last_values = last_values_ptr + row * last_values_stride
        next_valid = tl.load(last_values, mask=row < rows, other=0).to(tl.float32)

    tiles = tl.cdiv(steps, BLOCK_T)
    for tile in range(tiles):
        start = (tiles - 1 - tile) * BLOCK_T
        # against time: a reversed scan would cost shuffles
        t = start + BLOCK_T - 1 - tl.arange(0, BLOCK_T)
        is_first = tl.expand_dims(t == start, 1 - TIME_AXIS)
        inside = row_inside & tl.expand_dims(t < steps, 1 - TIME_AXIS)
        next_inside = row_inside & tl.expand_dims(t + 1 < steps, 1 - TIME_AXIS)
        keep, next_keep = inside, next_inside
        if mask_ptr is not None:
            pointers = _pointers(mask_ptr, row, t, mask_stride_b, mask_stride_t, TIME_AXIS, DENSE)
            keep &= tl.load(pointers, mask=inside, other=0) != 0
            next_keep &= tl.load(pointers + mask_stride_t, mask=next_inside, other=0) != 0
        pointers = _pointers(
            rewards_ptr, row, t, rewards_stride_b, rewards_stride_t, TIME_AXIS, DENSE
        )
        reward = tl.load(pointers, mask=keep, other=0).to(tl.float32)
        pointers = _pointers(values_ptr, row, t, values_stride_b, values_stride_t, TIME_AXIS, DENSE)
        value = tl.load(pointers, mask=keep, other=0).to(tl.float32)
        next_value = tl.load(pointers + values_stride_t, mask=next_keep, other=0).to(tl.float32)
        if CARRY and mask_ptr is not None:
            passes = tl.where(next_keep, 0.0, 1.0)
            next_value = _scan(passes, next_value, next_valid, TIME_AXIS)
        else:
            after = tl.expand_dims(next_valid, TIME_AXIS)
            next_value = tl.where(next_inside, next_value, after)
        next_valid = _at(next_value, is_first, TIME_AXIS)

        terminal = _ends(
            terminated_ptr, terminated_stride_b, terminated_stride_t, last_terminated_ptr,
            last_terminated_stride, row, t, rows, steps, keep, STARTS_AT_T, TIME_AXIS, DENSE,
        )  # fmt: skip
        cut = _ends(
            truncated_ptr, truncated_stride_b, truncated_stride_t, last_truncated_ptr,
            last_truncated_stride, row, t, rows, steps, keep, STARTS_AT_T, TIME_AXIS, DENSE,
        )  # fmt: skip
        if final_values_ptr is not None:
            pointers = _pointers(
                final_values_ptr, row, t, final_values_stride_b, final_values_stride_t,
                TIME_AXIS, DENSE,
            )  # fmt: skip
            final_value = tl.load(pointers, mask=cut, other=0).to(tl.float32)
            next_value = tl.where(cut, final_value, next_value)
        delta = reward + gamma * tl.where(terminal, 0.0, next_value) - value
        c = tl.where(terminal | cut, 0.0, decay)
        # outside the row, and where a mask carries: the identity
        counts = keep if CARRY else inside
        advantage = _scan(tl.where(counts, c, 1.0), tl.where(counts, delta, 0.0), state, TIME_AXIS)
        state = _at(advantage, is_first, TIME_AXIS)
        pointers = _pointers(
            advantages_ptr, row, t, advantages_stride_b, advantages_stride_t, TIME_AXIS, DENSE
        )
        tl.store(pointers, tl.where(keep, advantage, 0.0), mask=inside)
        pointers = _pointers(
            returns_ptr, row, t, returns_stride_b, returns_stride_t, TIME_AXIS, DENSE
        )
        tl.store(pointers, tl.where(keep, advantage + value, 0.0), mask=inside)


@triton.jit
def _now_and_before(
    ptr, row, t, stride_row, stride_step, keep, before_keep,
    TIME_AXIS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """An upstream gradient at t and at t - 1; zeros if there is none."""
    if ptr is None:
        now = tl.zeros(keep.shape, tl.float32)
        before = now
    else:
        pointers = _pointers(ptr, row, t, stride_row, stride_step, TIME_AXIS, DENSE)
        now = tl.load(pointers, mask=keep, other=0)
        before = tl.load(pointers - stride_step, mask=before_keep, other=0)
    return now, before


@kernel()
def _gae_bwd_kernel(
    mask_ptr, mask_stride_b: tl.int64, mask_stride_t: tl.int64,
    terminated_ptr, terminated_stride_b: tl.int64, terminated_stride_t: tl.int64,
    truncated_ptr, truncated_stride_b: tl.int64, truncated_stride_t: tl.int64,
    last_terminated_ptr, last_terminated_stride: tl.int64,
    last_truncated_ptr, last_truncated_stride: tl.int64,
    gamma: tl.float32, gae_lambda: tl.float32, rows: tl.int64, steps: tl.int64,
    grad_advantages_ptr, grad_advantages_stride_b: tl.int64, grad_advantages_stride_t: tl.int64,
    grad_returns_ptr, grad_returns_stride_b: tl.int64, grad_returns_stride_t: tl.int64,
    grad_rewards_ptr, grad_rewards_stride_b: tl.int64, grad_rewards_stride_t: tl.int64,
    grad_values_ptr, grad_values_stride_b: tl.int64, grad_values_stride_t: tl.int64,
    grad_last_values_ptr, grad_last_values_stride: tl.int64,
    grad_final_values_ptr, grad_final_values_stride_b: tl.int64,
    grad_final_values_stride_t: tl.int64,
    CARRY: tl.constexpr, STARTS_AT_T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, TIME_AXIS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_inside = tl.expand_dims(row < rows, TIME_AXIS)
    decay = gamma * gae_lambda
    # adjoint of A at the step before, 0 where its episode ended there: a step receives it times
    # decay through the trace and times gamma through its value
    state = tl.zeros([BLOCK_B], tl.float32)
    last_adjoint = tl.zeros([BLOCK_B], tl.float32)
    # one position more than steps, for the value after the last
    for start in range(0, steps + 1, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = row_inside & tl.expand_dims(t < steps, 1 - TIME_AXIS)
        before_inside = row_inside & tl.expand_dims((t > 0) & (t <= steps), 1 - TIME_AXIS)
        keep, before_keep = inside, before_inside
        if mask_ptr is not None:
            pointers = _pointers(mask_ptr, row, t, mask_stride_b, mask_stride_t, TIME_AXIS, DENSE)
            keep &= tl.load(pointers, mask=inside, other=0) != 0
            before_keep &= tl.load(pointers - mask_stride_t, mask=before_inside, other=0) != 0
        grad_return, before_return = _now_and_before(
            grad_returns_ptr, row, t, grad_returns_stride_b, grad_returns_stride_t,
            keep, before_keep, TIME_AXIS, DENSE,
        )  # fmt: skip
        grad, before_grad = _now_and_before(
            grad_advantages_ptr, row, t, grad_advantages_stride_b, grad_advantages_stride_t,
            keep, before_keep, TIME_AXIS, DENSE,
        )  # fmt: skip
        grad += grad_return
        before_grad += before_return
        ended = _ends(
            terminated_ptr, terminated_stride_b, terminated_stride_t, last_terminated_ptr,
            last_terminated_stride, row, t - 1, rows, steps, before_keep,
            STARTS_AT_T, TIME_AXIS, DENSE,
        ) | _ends(
            truncated_ptr, truncated_stride_b, truncated_stride_t, last_truncated_ptr,
            last_truncated_stride, row, t - 1, rows, steps, before_keep,
            STARTS_AT_T, TIME_AXIS, DENSE,
        )  # fmt: skip
        counts = before_keep if CARRY else before_inside
        c = tl.where(counts, tl.where(ended, 0.0, decay), 1.0)
        adjoint = _scan(c, tl.where(ended, 0.0, before_grad), state, TIME_AXIS)
        is_last = tl.expand_dims(t == start + BLOCK_T - 1, 1 - TIME_AXIS)
        state = _at(adjoint, is_last, TIME_AXIS)

        total = grad + decay * adjoint
        pointers = _pointers(
            grad_rewards_ptr, row, t, grad_rewards_stride_b, grad_rewards_stride_t, TIME_AXIS, DENSE
        )
        tl.store(pointers, tl.where(keep, total, 0.0), mask=inside)
        pointers = _pointers(
            grad_values_ptr, row, t, grad_values_stride_b, grad_values_stride_t, TIME_AXIS, DENSE
        )
        grad_value = grad_return - total + gamma * adjoint
        tl.store(pointers, tl.where(keep, grad_value, 0.0), mask=inside)
        if grad_final_values_ptr is not None:
            terminal = _ends(
                terminated_ptr, terminated_stride_b, terminated_stride_t, last_terminated_ptr,
                last_terminated_stride, row, t, rows, steps, keep, STARTS_AT_T, TIME_AXIS, DENSE,
            )  # fmt: skip
            cut = _ends(
                truncated_ptr, truncated_stride_b, truncated_stride_t, last_truncated_ptr,
                last_truncated_stride, row, t, rows, steps, keep, STARTS_AT_T, TIME_AXIS, DENSE,
            )  # fmt: skip
            pointers = _pointers(
                grad_final_values_ptr, row, t,
                grad_final_values_stride_b, grad_final_values_stride_t, TIME_AXIS, DENSE,
            )  # fmt: skip
            tl.store(pointers, tl.where(cut & ~terminal, gamma * total, 0.0), mask=inside)
        # nothing but in the tile that holds the position after the last step
        after = tl.expand_dims(t == steps, 1 - TIME_AXIS)
        last_adjoint += _at(adjoint, after, TIME_AXIS)
    if grad_last_values_ptr is not None:
        pointers = grad_last_values_ptr + row * grad_last_values_stride
        tl.store(pointers, gamma * last_adjoint, mask=row < rows)


def _tile(
    dense_steps: tuple[int, int, int], first: Tensor, *others: Tensor | None
) -> tuple[int, dict[str, int]]:
    """Number of programs and the tile, by which dimension of the first tensor is dense."""
    rows, steps = first.shape
    stride_row, stride_step = first.stride()
    # equal strides are those of one column [T, 1]
    time_axis = 0 if stride_row <= stride_step else 1
    if time_axis == 0:
        block_b, block_t, warps = dense_steps
    else:
        block_b, block_t, warps = SHORT_ROWS if steps <= SHORT_ROWS[1] else LONG_ROWS
    return triton.cdiv(rows, block_b), {
        "BLOCK_B": block_b,
        "BLOCK_T": block_t,
        "TIME_AXIS": time_axis,
        "DENSE": all(
            x is None or x.shape[time_axis] == 1 or x.stride(time_axis) == 1
            for x in (first, *others)
        ),
        "num_warps": warps,
    }


def gae_forward(
    rows: int,
    steps: int,
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor | None,
    final_values: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    gamma: float,
    gae_lambda: float,
    carry: bool,
    starts_at_t: bool,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    """The fields of `Gae`."""
    if rows * steps == 0:
        return
    programs, tile = _tile(
        DENSE_STEPS, rewards, values, final_values, mask, terminated, truncated, advantages, returns
    )
    with torch.cuda.device_of(rewards):
        _gae_fwd_kernel[(programs,)](
            *strided(rewards), *strided(values), *column(last_values), *strided(final_values),
            *strided(mask), *strided(terminated), *strided(truncated),
            *column(last_terminated), *column(last_truncated),
            float(gamma), float(gae_lambda), rows, steps,
            *strided(advantages), *strided(returns),
            CARRY=carry, STARTS_AT_T=starts_at_t, **tile, enable_fp_fusion=True,
        )  # fmt: skip


def gae_backward(
    rows: int,
    steps: int,
    _rewards: None,
    _values: None,
    _last_values: None,
    _final_values: None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    gamma: float,
    gae_lambda: float,
    carry: bool,
    starts_at_t: bool,
    _advantages: None,
    _returns: None,
    grad_advantages: Tensor | None,
    grad_returns: Tensor | None,
    grad_rewards: Tensor,
    grad_values: Tensor,
    grad_last_values: Tensor | None,
    grad_final_values: Tensor | None,
) -> None:
    """The fields of `GaeBackward`. The recursion is linear: rewards and values are not needed."""
    if rows * steps == 0:
        return
    programs, tile = _tile(
        DENSE_STEPS_BACKWARD, grad_rewards, grad_values, grad_advantages, grad_returns,
        grad_final_values, mask, terminated, truncated,
    )  # fmt: skip
    with torch.cuda.device_of(grad_rewards):
        _gae_bwd_kernel[(programs,)](
            *strided(mask), *strided(terminated), *strided(truncated),
            *column(last_terminated), *column(last_truncated),
            float(gamma), float(gae_lambda), rows, steps,
            *strided(grad_advantages), *strided(grad_returns),
            *strided(grad_rewards), *strided(grad_values),
            *column(grad_last_values), *strided(grad_final_values),
            CARRY=carry, STARTS_AT_T=starts_at_t, **tile, enable_fp_fusion=True,
        )  # fmt: skip
