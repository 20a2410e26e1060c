"""The state (maximum, sum, weighted sum) of a row of logits, read in blocks: online softmax.

A block of the row is seen as `[REPEAT, LANES, WIDTH]` with one thread a lane, so that a lane keeps
its own maximum and sums in registers and the threads of a row meet once, after the last block of a
chunk.
"""

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of it is 0 in float32, and 0 * -200 is 0 where 0 * -inf is NaN: so -inf logits are legal
FLOOR = tl.constexpr(-200.0)
INF = tl.constexpr(float("inf"))


@triton.jit
def inverse_temperature(temperature):
    """NaN, which poisons the token, where there is no distribution: 0, negative, infinite, NaN."""
    valid = (temperature > 0) & (temperature < float("inf"))
    return tl.where(valid, 1.0 / temperature, float("nan"))


@triton.jit
def _add_block(
    x,
    scale,
    top,
    total,
    weighted,
    WITH_ENTROPY: tl.constexpr,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block into the sums of each lane: total of 2^d, weighted of 2^d d, d = (x - top) scale."""
    x = tl.reshape(x, [REPEAT, LANES, WIDTH]).to(tl.float32)
    new_top = tl.maximum(top, tl.max(tl.max(x, 2), 0))
    base = tl.where(new_top == -INF, 0.0, new_top)
    shift = tl.maximum((top - base) * scale, FLOOR)
    decay = tl.exp2(shift)
    d = (x - base[None, :, None]) * scale
    # with propagation: a NaN logit makes its row NaN
    d = tl.maximum(d, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d)
    if WITH_ENTROPY:
        weighted = decay * (weighted + shift * total) + tl.sum(tl.sum(e * d, 2), 0)
    total = decay * total + tl.sum(tl.sum(e, 2), 0)
    return new_top, total, weighted


@triton.jit
def _merge(row, chunk, scale):
    """(maximum, total, weighted) of a row so far, and of its next chunk, in one."""
    row_top, row_total, row_weighted = row
    top, total, weighted = chunk
    new_top = tl.maximum(row_top, top)
    base = tl.where(new_top == -INF, 0.0, new_top)
    row_shift = tl.maximum((row_top - base) * scale, FLOOR)
    shift = tl.maximum((top - base) * scale, FLOOR)
    row_decay, decay = tl.exp2(row_shift), tl.exp2(shift)
    # fma: which product the compiler would fuse is not the same in every kernel
    row_weighted = row_decay * tl.fma(row_shift, row_total, row_weighted)
    weighted = tl.fma(decay, tl.fma(shift, total, weighted), row_weighted)
    return new_top, tl.fma(decay, total, row_decay * row_total), weighted


@triton.jit
def _merge_lanes(top, total, weighted, scale, WITH_ENTROPY: tl.constexpr):
    chunk_top = tl.max(top)
    base = tl.where(chunk_top == -INF, 0.0, chunk_top)
    shift = tl.maximum((top - base) * scale, FLOOR)
    decay = tl.exp2(shift)
    chunk_weighted = 0.0
    if WITH_ENTROPY:
        chunk_weighted = tl.sum(decay * tl.fma(shift, total, weighted))
    return chunk_top, tl.sum(total * decay), chunk_weighted


@triton.jit
def _read(
    row_ptr,
    start,
    stop,
    columns_of_a_chunk,
    scale,
    WITH_ENTROPY: tl.constexpr,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The merged state of columns [start, stop); start is the first of a chunk."""
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    columns = tl.arange(0, BLOCK)
    row_top, row_total, row_weighted = -INF, 0.0, 0.0
    top = tl.full([LANES], -INF, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    full = start + (stop - start) // BLOCK * BLOCK
    for block in tl.range(start, full, BLOCK, num_stages=3):
        x = tl.load(row_ptr + block + columns)
        top, total, weighted = _add_block(
            x, scale, top, total, weighted, WITH_ENTROPY, REPEAT, LANES, WIDTH
        )
        if (block + BLOCK) % columns_of_a_chunk == 0:
            row_top, row_total, row_weighted = _merge(
                (row_top, row_total, row_weighted),
                _merge_lanes(top, total, weighted, scale, WITH_ENTROPY),
                scale,
            )
            top = tl.full([LANES], -INF, tl.float32)
            total = tl.zeros([LANES], tl.float32)
            weighted = tl.zeros([LANES], tl.float32)
    if full < stop:
        x = tl.load(row_ptr + full + columns, mask=full + columns < stop, other=-INF)
        top, total, weighted = _add_block(
            x, scale, top, total, weighted, WITH_ENTROPY, REPEAT, LANES, WIDTH
        )
    # where the row ends with a chunk this adds nothing
    return _merge(
        (row_top, row_total, row_weighted),
        _merge_lanes(top, total, weighted, scale, WITH_ENTROPY),
        scale,
    )


def _load_width(*tensors: Tensor) -> int:
    """Elements that a thread loads at once: 16 bytes where all rows are so aligned, else 1."""
    width = 16 // tensors[0].element_size()
    for tensor in tensors:
        rows, stride_b, stride_t = tensor.shape[0], tensor.stride(0), tensor.stride(1)
        if tensor.data_ptr() % 16 or stride_t % width or (rows > 1 and stride_b % width):
            return 1
    return width


def _rows(tensor: Tensor, width: int) -> tuple[Tensor, int, int]:
    """Pointer and strides in groups of `width`."""
    return tensor, tensor.stride(0) // width, tensor.stride(1) // width
