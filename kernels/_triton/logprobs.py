"""Log-probability and entropy from logits: a program a token forward, a piece of a row backward.

Forward, a block of the row is seen as `[REPEAT, LANES, WIDTH]` with one thread a lane, so that a
lane keeps its own maximum and sums in registers and the threads of a row meet once, after the last
block. The order of all sums depends on V and on the width of the loads, never on other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import kernel, strided

BLOCK = 4096
FORWARD_WARPS = 8
BACKWARD_WARPS = 4

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of it is 0 in float32, and 0 * -200 is 0 where 0 * -inf is NaN: so -inf logits are legal
FLOOR = tl.constexpr(-200.0)
INF = tl.constexpr(float("inf"))


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
    stats_ptr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
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
        result = tl.where(valid, float("nan"), 0.0)
        tl.store(logprobs_ptr, result)
        tl.store(stats_ptr, result)
        tl.store(stats_ptr + 1, result)
        if entropy_ptr is not None:
            tl.store(entropy_ptr, result)
        return

    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    WITH_ENTROPY: tl.constexpr = entropy_ptr is not None
    # strides count groups of WIDTH, which tells the compiler that rows are aligned for wide loads
    logits_ptr += (b * logits_stride_b + t * logits_stride_t) * WIDTH
    inverse = 1.0 / temperature
    scale = inverse * LOG2_E
    columns = tl.arange(0, BLOCK)
    chosen = tl.load(logits_ptr + target).to(tl.float32)
    top = tl.full([LANES], -INF, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    full = vocab // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK, num_stages=3):
        x = tl.load(logits_ptr + start + columns)
        top, total, weighted = _add_block(
            x, scale, top, total, weighted, WITH_ENTROPY, REPEAT, LANES, WIDTH
        )
    if full < vocab:
        x = tl.load(logits_ptr + full + columns, mask=full + columns < vocab, other=-INF)
        top, total, weighted = _add_block(
            x, scale, top, total, weighted, WITH_ENTROPY, REPEAT, LANES, WIDTH
        )

    row_top = tl.max(top)
    base = tl.where(row_top == -INF, 0.0, row_top)
    shift = tl.maximum((top - base) * scale, FLOOR)
    decay = tl.exp2(shift)
    row_total = tl.sum(total * decay)
    log_sum = tl.where(row_total > 0, tl.log(row_total), float("nan"))
    logprob = (chosen - row_top) * inverse - log_sum
    tl.store(logprobs_ptr, tl.where(logprob > 0, 0.0, logprob))
    tl.store(stats_ptr, row_top)
    tl.store(stats_ptr + 1, log_sum)
    if WITH_ENTROPY:
        row_weighted = tl.sum(decay * (weighted + shift * total))
        tl.store(entropy_ptr, log_sum - LN_2 * row_weighted / row_total)


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
    inverse = 1.0 / temperature
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
) -> None:
    """The fields of `Logprobs`."""
    if rows * steps == 0:
        return
    width = _load_width(logits)
    lanes = 32 * FORWARD_WARPS
    with torch.cuda.device_of(logits):
        _logprobs_fwd_kernel[(rows * steps,)](
            *_rows(logits, width), vocab, *strided(targets), float(temperature),
            *strided(token_temperature), *strided(mask), ignore_index, steps,
            *strided(logprobs), *strided(entropy), stats,
            REPEAT=BLOCK // (lanes * width), LANES=lanes, WIDTH=width,
            num_warps=FORWARD_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


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
