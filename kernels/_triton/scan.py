"""What the scans over steps share: where their tiles lie, which steps end an episode, affine maps.

Every step is a map x_t = c x_{t+1} + b, and maps compose. A program walks its rows tile by tile,
scans each tile and carries the state across; the order of the sums depends on the number of steps
alone. One kernel serves both layouts: the tile is [rows, time] or [time, rows], whichever has the
fast dimension last. With cu_seqlens a program has one sequence.
"""

import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.gae import GaeArguments
from warpo.kernels._triton.launch import column, strided
from warpo.kernels._triton.offsets import extent

# (rows, steps) of a tile and its warps, for rows dense in time and for steps dense in rows. The
# short tiles keep threads busy where a row is shorter than the long one. Larger tiles spill
# registers on some of sm_80, sm_90 and sm_100, see tests/kernels/test_triton_compile.py.
TINY_ROWS = (16, 16, 4)
SHORT_ROWS = (2, 128, 4)
LONG_ROWS = (1, 1024, 8)
LONG_ROWS_RATIOS = (1, 512, 8)
DENSE_STEPS = (32, 32, 8)


@triton.jit
def compose(c_first, b_first, c_then, b_then):
    """The map x -> c_then (c_first x + b_first) + b_then; c_then = 0 also stops NaN and inf."""
    return c_then * c_first, tl.where(c_then == 0, b_then, b_then + c_then * b_first)


@triton.jit
def scan(c, b, state, TIME_AXIS: tl.constexpr):
    """Images of `state` under the maps of a tile, composed in its order."""
    c, b = tl.associative_scan((c, b), TIME_AXIS, compose)
    return tl.where(c == 0, b, b + c * tl.expand_dims(state, TIME_AXIS))


@triton.jit
def _compose_with_before(
    c_first, b_first, c_before_first, b_before_first, c_then, b_then, c_before_then, b_before_then
):
    c, b = compose(c_first, b_first, c_then, b_then)
    c_before, b_before = compose(c_first, b_first, c_before_then, b_before_then)
    return c, b, c_before, b_before


@triton.jit
def scan_with_before(c, b, state, TIME_AXIS: tl.constexpr):
    """Images of `state` under the maps up to each, and under those before each."""
    one, zero = tl.full(c.shape, 1.0, tl.float32), tl.zeros(c.shape, tl.float32)
    c, b, c_before, b_before = tl.associative_scan(
        (c, b, one, zero), TIME_AXIS, _compose_with_before
    )
    state = tl.expand_dims(state, TIME_AXIS)
    before = tl.where(c_before == 0, b_before, b_before + c_before * state)
    return tl.where(c == 0, b, b + c * state), before


@triton.jit
def at(tile, chosen, TIME_AXIS: tl.constexpr):
    """The one value of each row that is chosen along time."""
    return tl.sum(tl.where(chosen, tile, 0.0), TIME_AXIS)


@triton.jit
def bounds(cu_seqlens_ptr, rows, steps):
    """Where the rows of this program begin in their arrays, how many steps they have, and whether
    the offsets of a packed row are malformed: then its results are NaN.
    """
    if cu_seqlens_ptr is None:
        start = tl.zeros_like(steps)
        length = steps
        malformed = steps < 0
    else:
        row = tl.program_id(0).to(tl.int64)
        start, end, malformed = extent(cu_seqlens_ptr, 1, rows, row, steps, row < rows)
        length = end - start
    return start, length, malformed


@triton.jit
def zero_outside(ptr, start, length, rows, steps, cu_seqlens_ptr, BLOCK: tl.constexpr):
    """Steps of no packed row: before the first, by its program, and after the last."""
    if ptr is not None and cu_seqlens_ptr is not None:
        row = tl.program_id(0)
        for first in range(0, tl.where(row == 0, start, 0), BLOCK):
            step = first + tl.arange(0, BLOCK)
            tl.store(ptr + step, tl.zeros([BLOCK], tl.float32), mask=step < start)
        for first in range(tl.where(row == rows - 1, start + length, steps), steps, BLOCK):
            step = first + tl.arange(0, BLOCK)
            tl.store(ptr + step, tl.zeros([BLOCK], tl.float32), mask=step < steps)


@triton.jit
def poison_if(malformed, tile, cu_seqlens_ptr):
    if cu_seqlens_ptr is not None:
        tile = tl.where(malformed, float("nan"), tile)
    return tile


@triton.jit
def pointers(ptr, row, step, stride_row, stride_step, TIME_AXIS: tl.constexpr, DENSE: tl.constexpr):
    # DENSE tells the compiler where neighbours in memory are, so that it puts threads there
    rows = row if DENSE and TIME_AXIS == 0 else row * stride_row
    steps = step if DENSE and TIME_AXIS == 1 else step * stride_step
    return ptr + tl.expand_dims(rows, TIME_AXIS) + tl.expand_dims(steps, 1 - TIME_AXIS)


@triton.jit
def load(
    ptr, row, step, stride_row, stride_step, keep, TIME_AXIS: tl.constexpr, DENSE: tl.constexpr
):
    """Numbers of a tile, 0 where not kept or absent."""
    if ptr is None:
        tile = tl.zeros(keep.shape, tl.float32)
    else:
        where = pointers(ptr, row, step, stride_row, stride_step, TIME_AXIS, DENSE)
        tile = tl.load(where, mask=keep, other=0).to(tl.float32)
    return tile


@triton.jit
def store(
    ptr,
    row,
    step,
    stride_row,
    stride_step,
    tile,
    inside,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    if ptr is not None:
        where = pointers(ptr, row, step, stride_row, stride_step, TIME_AXIS, DENSE)
        tl.store(where, tile, mask=inside)


@triton.jit
def is_kept(
    mask_ptr,
    row,
    step,
    stride_row,
    stride_step,
    inside,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    keep = inside
    if mask_ptr is not None:
        where = pointers(mask_ptr, row, step, stride_row, stride_step, TIME_AXIS, DENSE)
        keep &= tl.load(where, mask=inside, other=0) != 0
    return keep


@triton.jit
def ends(
    ptr,
    stride_row,
    stride_step,
    last_ptr,
    last_stride,
    row,
    start,
    t,
    rows,
    length,
    keep,
    STARTS_AT_T: tl.constexpr,
    TIME_AXIS: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Whether an episode ends at each kept step; under STARTS_AT_T the flag of the next step."""
    if ptr is None:
        found = keep & False
    elif STARTS_AT_T:
        is_last = tl.expand_dims(t + 1 >= length, 1 - TIME_AXIS)
        where = pointers(ptr, row, start + t + 1, stride_row, stride_step, TIME_AXIS, DENSE)
        found = tl.load(where, mask=keep & ~is_last, other=0) != 0
        if last_ptr is not None:
            last = tl.load(last_ptr + row * last_stride, mask=row < rows, other=0) != 0
            found |= keep & is_last & tl.expand_dims(last, TIME_AXIS)
    else:
        where = pointers(ptr, row, start + t, stride_row, stride_step, TIME_AXIS, DENSE)
        found = tl.load(where, mask=keep, other=0) != 0
    return found


def choose_tile(
    a: GaeArguments,
    *per_step: Tensor | None,
    long_rows: tuple[int, int, int] = LONG_ROWS,
) -> tuple[int, dict[str, int]]:
    """Number of programs and the tile, by which dimension of the first tensor is dense."""
    present = [x for x in per_step if x is not None]
    time_axis, block_b, block_t, warps = 1, *long_rows
    if a.scan.cu_seqlens is None:
        stride_row, stride_step = present[0].stride()
        # equal strides are those of one column [T, 1]
        if stride_row <= stride_step:
            time_axis, block_b, block_t, warps = 0, *DENSE_STEPS
        elif a.steps <= TINY_ROWS[1]:
            block_b, block_t, warps = TINY_ROWS
        elif a.steps <= SHORT_ROWS[1]:
            block_b, block_t, warps = SHORT_ROWS
    fast = -1 if time_axis == 1 else 0
    return triton.cdiv(a.rows, block_b), {
        "BLOCK_B": block_b,
        "BLOCK_T": block_t,
        "TIME_AXIS": time_axis,
        "DENSE": all(x.shape[fast] == 1 or x.stride(fast) == 1 for x in present),
        "num_warps": warps,
    }


def flags_and_ends(a: GaeArguments) -> tuple:
    """Arguments of the kernels."""
    return (
        *strided(a.scan.mask),
        *strided(a.scan.terminated),
        *strided(a.scan.truncated),
        *column(a.scan.last_terminated),
        *column(a.scan.last_truncated),
    )
