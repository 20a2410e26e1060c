"""Log-probability and entropy from logits: a program a token forward, a piece of a row backward.

The order of all sums depends on V and on the width of the loads, never on other rows: where rows
are few, the chunks go to programs of their own, and are merged in the same order.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.logprobs import LogprobsArguments, LogprobsBackwardArguments
from warpo.kernels._triton.launch import kernel, strided
from warpo.kernels._triton.online_softmax import (
    FLOOR,
    INF,
    LN_2,
    LOG2_E,
    _load_width,
    _merge,
    _read,
    _rows,
    inverse_temperature,
)

BLOCK = 4096
CHUNKS = 8  # kLogprobsChunks: the most that a row has
FORWARD_WARPS = 8
BACKWARD_WARPS = 4


@triton.jit
def _finish(
    row_top, row_total, row_weighted, chosen, inverse, logprobs_ptr, entropy_ptr, stats_ptr
):
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
    logits_ptr,
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    vocab: tl.int32,
    targets_ptr,
    targets_stride_b: tl.int64,
    targets_stride_t: tl.int64,
    temperature: tl.float32,
    temperature_ptr,
    temperature_stride_b: tl.int64,
    temperature_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    ignore_index: tl.int64,
    steps: tl.int64,
    logprobs_ptr,
    logprobs_stride_b: tl.int64,
    logprobs_stride_t: tl.int64,
    entropy_ptr,
    entropy_stride_b: tl.int64,
    entropy_stride_t: tl.int64,
    stats_ptr,
    partials_ptr,
    columns_of_a_chunk: tl.int32,
    MODE: tl.constexpr,
    CHUNKS: tl.constexpr,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
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
    logits_ptr,
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    vocab: tl.int32,
    targets_ptr,
    targets_stride_b: tl.int64,
    targets_stride_t: tl.int64,
    temperature: tl.float32,
    temperature_ptr,
    temperature_stride_b: tl.int64,
    temperature_stride_t: tl.int64,
    mask_ptr,
    mask_stride_b: tl.int64,
    mask_stride_t: tl.int64,
    ignore_index: tl.int64,
    steps: tl.int64,
    entropy_ptr,
    entropy_stride_b: tl.int64,
    entropy_stride_t: tl.int64,
    stats_ptr,
    grad_logprobs_ptr,
    grad_logprobs_stride_b: tl.int64,
    grad_logprobs_stride_t: tl.int64,
    grad_entropy_ptr,
    grad_entropy_stride_b: tl.int64,
    grad_entropy_stride_t: tl.int64,
    grad_logits_ptr,
    grad_logits_stride_b: tl.int64,
    grad_logits_stride_t: tl.int64,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
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


def logprobs_forward(a: LogprobsArguments) -> None:
    tokens = a.rows * a.steps
    if tokens == 0:
        return
    width = _load_width(a.logits)
    lanes = 32 * FORWARD_WARPS
    columns_of_a_chunk = triton.cdiv(a.vocab, BLOCK * CHUNKS) * BLOCK
    chunks = triton.cdiv(a.vocab, columns_of_a_chunk)
    partials = None if chunks == 1 else a.partials

    def launch(mode: str, programs: int, warps: int) -> None:
        _logprobs_fwd_kernel[(programs,)](
            *_rows(a.logits, width),
            a.vocab,
            *strided(a.targets),
            float(a.temperature),
            *strided(a.token_temperature),
            *strided(a.mask),
            a.ignore_index,
            a.steps,
            *strided(a.logprobs),
            *strided(a.entropy),
            a.stats,
            partials,
            columns_of_a_chunk,
            MODE=mode,
            CHUNKS=CHUNKS,
            REPEAT=BLOCK // (lanes * width),
            LANES=lanes,
            WIDTH=width,
            num_warps=warps,
            enable_fp_fusion=True,
        )

    with torch.cuda.device_of(a.logits):
        if partials is None:
            return launch("row", tokens, FORWARD_WARPS)
        launch("chunk", tokens * chunks, FORWARD_WARPS)
        launch("merge", tokens, 1)


def logprobs_backward(a: LogprobsBackwardArguments) -> None:
    """`grad_logits` may be `logits`: each piece is read before it is written."""
    f = a.forward
    if f.rows * f.steps == 0:
        return
    width = _load_width(f.logits, a.grad_logits)
    with torch.cuda.device_of(f.logits):
        _logprobs_bwd_kernel[(f.rows * f.steps * triton.cdiv(f.vocab, BLOCK),)](
            *_rows(f.logits, width),
            f.vocab,
            *strided(f.targets),
            float(f.temperature),
            *strided(f.token_temperature),
            *strided(f.mask),
            f.ignore_index,
            f.steps,
            *strided(f.entropy),
            f.stats,
            *strided(a.grad_logprobs),
            *strided(a.grad_entropy),
            *_rows(a.grad_logits, width),
            BLOCK=BLOCK,
            WIDTH=width,
            num_warps=BACKWARD_WARPS,
            enable_fp_fusion=True,
        )
