"""Log-probability and entropy from logits: a program a token forward, a piece of a row backward.

Forward, a block of the row is seen as `[REPEAT, LANES, WIDTH]` with one thread a lane, so that a
lane keeps its own maximum and sums in registers and the threads of a row meet once, after the last
block of a chunk. The order of all sums depends on V and on the width of the loads, never on other
rows: where rows are few, the chunks go to programs of their own, and are merged in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import kernel, strided

BLOCK = 4096
CHUNKS = 8  # kLogprobsChunks: the most that a row has
FORWARD_WARPS = 8
BACKWARD_WARPS = 4

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
    x, scale, top, total, weighted, WITH_ENTROPY: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
    row_ptr, start, stop, columns_of_a_chunk, scale, WITH_ENTROPY: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _finish(
    row_top, row_total, row_weighted, chosen, inverse, logprobs_ptr, entropy_ptr, stats_ptr
):  # fmt: skip
    log_sum = tl.where(row_total > 0, tl.log(row_total), float("nan"))
    logprob = (chosen - row_top) * inverse - log_sum
    tl.store(logprobs_ptr, tl.where(logprob > 0, 0.0, logprob))
    tl.store(stats_ptr, row_top)
    tl.store(stats_ptr + 1, log_sum)
    if entropy_ptr is not None:
        tl.store(entropy_ptr, log_sum - LN_2 * row_weighted / row_total)


@triton.jit
def _poison(valid, logprobs_ptr, entropy_ptr, stats_ptr):
    """The results of a token whose logits are not read."""
    result = tl.where(valid, float("nan"), 0.0)
    tl.store(logprobs_ptr, result)
    tl.store(stats_ptr, result)
    tl.store(stats_ptr + 1, result)
    if entropy_ptr is not None:
        tl.store(entropy_ptr, result)


@kernel("logits_ptr")
def _logprobs_fwd_kernel(
    logits_ptr, logits_stride_b: tl.int64, logits_stride_t: tl.int64, vocab: tl.int32,
    targets_ptr, targets_stride_b: tl.int64, targets_stride_t: tl.int64,
    temperature: tl.float32,
    temperature_ptr, temperature_stride_b: tl.int64, temperature_stride_t: tl.int64,
    mask_ptr, mask_stride_b: tl.int64, mask_stride_t: tl.int64,
    ignore_index: tl.int64, steps: tl.int64,
    logprobs_ptr, logprobs_stride_b: tl.int64, logprobs_stride_t: tl.int64,
    entropy_ptr, entropy_stride_b: tl.int64, entropy_stride_t: tl.int64,
    stats_ptr, partials_ptr, columns_of_a_chunk: tl.int32,
    MODE: tl.constexpr, CHUNKS: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """MODE "row": a program a token. "chunk": one a chunk of it, to partials. "merge": the chunks
    of a token in one."""
    chunks = tl.cdiv(vocab, columns_of_a_chunk)
    program = tl.program_id(0)
    chunk = 0
    if MODE == "chunk":
        chunk = program % chunks
        program = program // chunks
    token = program.to(tl.int64)
    b, t = token // steps, token % steps
    logprobs_ptr += b * logprobs_stride_b + t * logprobs_stride_t
    stats_ptr += 2 * token
    if entropy_ptr is not None:
        entropy_ptr += b * entropy_stride_b + t * entropy_stride_t
    target = tl.load(targets_ptr + b * targets_stride_b + t * targets_stride_t)
    valid = target != ignore_index
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t) != 0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + b * temperature_stride_b + t * temperature_stride_t)
    if not (valid & (target >= 0) & (target < vocab)):
        if MODE != "chunk":
            _poison(valid, logprobs_ptr, entropy_ptr, stats_ptr)
        return

    WITH_ENTROPY: tl.constexpr = entropy_ptr is not None
    # strides count groups of WIDTH, which tells the compiler that rows are aligned for wide loads
    logits_ptr += (b * logits_stride_b + t * logits_stride_t) * WIDTH
    inverse = inverse_temperature(temperature)
    scale = inverse * LOG2_E
    if MODE == "chunk":
        start = chunk * columns_of_a_chunk
        stop = tl.minimum(vocab - start, columns_of_a_chunk) + start
        top, total, weighted = _read(
            logits_ptr, start, stop, columns_of_a_chunk, scale, WITH_ENTROPY, REPEAT, LANES, WIDTH
        )
        partials_ptr += (token * CHUNKS + chunk) * 4
        tl.store(partials_ptr, top)
        tl.store(partials_ptr + 1, total)
        tl.store(partials_ptr + 2, weighted)
        return
    chosen = tl.load(logits_ptr + target).to(tl.float32)
    if MODE == "row":
        top, total, weighted = _read(
            logits_ptr, 0, vocab, columns_of_a_chunk, scale, WITH_ENTROPY, REPEAT, LANES, WIDTH
        )
    else:
        partials_ptr += token * CHUNKS * 4
        top, total, weighted = -INF, 0.0, 0.0
        for i in range(chunks):
            part_ptr = partials_ptr + 4 * i
            part = (tl.load(part_ptr), tl.load(part_ptr + 1), tl.load(part_ptr + 2))
            top, total, weighted = _merge((top, total, weighted), part, scale)
    _finish(top, total, weighted, chosen, inverse, logprobs_ptr, entropy_ptr, stats_ptr)


@kernel("logits_ptr", "grad_logits_ptr")
def _logprobs_bwd_kernel(
    logits_ptr, logits_stride_b: tl.int64, logits_stride_t: tl.int64, vocab: tl.int32,
    targets_ptr, targets_stride_b: tl.int64, targets_stride_t: tl.int64,
    temperature: tl.float32,
    temperature_ptr, temperature_stride_b: tl.int64, temperature_stride_t: tl.int64,
    mask_ptr, mask_stride_b: tl.int64, mask_stride_t: tl.int64,
    ignore_index: tl.int64, steps: tl.int64,
    entropy_ptr, entropy_stride_b: tl.int64, entropy_stride_t: tl.int64,
    stats_ptr,
    grad_logprobs_ptr, grad_logprobs_stride_b: tl.int64, grad_logprobs_stride_t: tl.int64,
    grad_entropy_ptr, grad_entropy_stride_b: tl.int64, grad_entropy_stride_t: tl.int64,
    grad_logits_ptr, grad_logits_stride_b: tl.int64, grad_logits_stride_t: tl.int64,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(vocab, BLOCK)
    program = tl.program_id(0)
    token = (program // pieces).to(tl.int64)
    start = program % pieces * BLOCK
    b, t = token // steps, token % steps
    target = tl.load(targets_ptr + b * targets_stride_b + t * targets_stride_t)
    valid = target != ignore_index
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t) != 0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + b * temperature_stride_b + t * temperature_stride_t)
    row_top = tl.load(stats_ptr + 2 * token)
    log_sum = tl.load(stats_ptr + 2 * token + 1)
    grad_logprob = 0.0
    if grad_logprobs_ptr is not None:
        grad_logprob = tl.load(
            grad_logprobs_ptr + b * grad_logprobs_stride_b + t * grad_logprobs_stride_t
        )
    grad_entropy = 0.0
    entropy = 0.0
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(
            grad_entropy_ptr + b * grad_entropy_stride_b + t * grad_entropy_stride_t
        )
        entropy = tl.load(entropy_ptr + b * entropy_stride_b + t * entropy_stride_t)

    grad_logits_ptr += (b * grad_logits_stride_b + t * grad_logits_stride_t) * WIDTH
    columns = start + tl.arange(0, BLOCK)
    inside = columns < vocab
    poisoned = valid & ((target < 0) | (target >= vocab) | (log_sum != log_sum))
    if poisoned | (not valid) | ((grad_logprob == 0) & (grad_entropy == 0)):
        fill = tl.full([BLOCK], 0.0, tl.float32) + tl.where(poisoned, float("nan"), 0.0)
        tl.store(grad_logits_ptr + columns, fill, mask=inside)
        return

    logits_ptr += (b * logits_stride_b + t * logits_stride_t) * WIDTH
    inverse = inverse_temperature(temperature)
    x = tl.load(logits_ptr + columns, mask=inside, other=-INF).to(tl.float32)
    log2_p = tl.maximum(
        (x - row_top) * (inverse * LOG2_E) - log_sum * LOG2_E,
        FLOOR,
        propagate_nan=tl.PropagateNan.ALL,
    )
    # d/dx_j = (g (1[j = y] - p_j) - h p_j (log p_j + H)) / T
    per_p = -(grad_logprob + grad_entropy * entropy) * inverse
    if grad_entropy_ptr is not None:
        gradient = tl.exp2(log2_p) * (per_p - grad_entropy * inverse * LN_2 * log2_p)
    else:
        gradient = tl.exp2(log2_p) * per_p
    gradient += tl.where(columns == target, grad_logprob * inverse, 0.0)
    tl.store(grad_logits_ptr + columns, gradient, mask=inside)


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


def logprobs_forward(
    rows: int,
    steps: int,
    vocab: int,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    logprobs: Tensor,
    entropy: Tensor | None,
    stats: Tensor,
    partials: Tensor | None,
) -> None:
    """The fields of `Logprobs`."""
    tokens = rows * steps
    if tokens == 0:
        return
    width = _load_width(logits)
    lanes = 32 * FORWARD_WARPS
    columns_of_a_chunk = triton.cdiv(vocab, BLOCK * CHUNKS) * BLOCK
    chunks = triton.cdiv(vocab, columns_of_a_chunk)
    partials = None if chunks == 1 else partials

    def launch(mode: str, programs: int, warps: int) -> None:
        _logprobs_fwd_kernel[(programs,)](
            *_rows(logits, width), vocab, *strided(targets), float(temperature),
            *strided(token_temperature), *strided(mask), ignore_index, steps,
            *strided(logprobs), *strided(entropy), stats, partials, columns_of_a_chunk,
            MODE=mode, CHUNKS=CHUNKS, REPEAT=BLOCK // (lanes * width), LANES=lanes, WIDTH=width,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device_of(logits):
        if partials is None:
            return launch("row", tokens, FORWARD_WARPS)
        launch("chunk", tokens * chunks, FORWARD_WARPS)
        launch("merge", tokens, 1)


def logprobs_backward(
    rows: int,
    steps: int,
    vocab: int,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    _logprobs: None,
    entropy: Tensor | None,
    stats: Tensor,
    _partials: None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """The fields of `LogprobsBackward`. `grad_logits` may be `logits`: each piece is read before it
    is written.
    """
    if rows * steps == 0:
        return
    width = _load_width(logits, grad_logits)
    with torch.cuda.device_of(logits):
        _logprobs_bwd_kernel[(rows * steps * triton.cdiv(vocab, BLOCK),)](
            *_rows(logits, width), vocab, *strided(targets), float(temperature),
            *strided(token_temperature), *strided(mask), ignore_index, steps,
            *strided(entropy), stats, *strided(grad_logprobs), *strided(grad_entropy),
            *_rows(grad_logits, width),
            BLOCK=BLOCK, WIDTH=width, num_warps=BACKWARD_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
