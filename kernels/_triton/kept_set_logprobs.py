"""Logprobs over the kept ids of each token: a program a token forward, a program a token and piece
of the hidden size backward, a program an id and piece of it for the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._arguments.kept_set_logprobs import (
    KeptSetLogprobsArguments,
    KeptSetLogprobsBackwardArguments,
    KeptSetWeightGradientArguments,
)
from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.offsets import extent
from warpo.kernels._triton.online_softmax import inverse_temperature

BLOCK_K = 16  # kept ids
BLOCK_H = 128  # columns
WARPS = 4

INF = tl.constexpr(float("inf"))


@triton.jit
def _entries(ids_ptr, start, stop, vocab, BLOCK_K: tl.constexpr):
    """Places of a block of entries, which of them exist, their ids, which of these are legal."""
    entry = start + tl.arange(0, BLOCK_K)
    inside = entry < stop
    ids = tl.load(ids_ptr + entry, mask=inside, other=0).to(tl.int64)
    return entry, inside, ids, inside & (ids >= 0) & (ids < vocab)


@kernel()
def _kept_set_fwd_kernel(
    num_kept: tl.int64,
    vocab: tl.int64,
    hidden_size: tl.int64,
    hidden_ptr,
    hidden_stride: tl.int64,
    weight_ptr,
    weight_stride: tl.int64,
    bias_ptr,
    bias_stride: tl.int64,
    targets_ptr,
    targets_stride: tl.int64,
    ids_ptr,
    offsets_ptr,
    temperature: tl.float32,
    temperature_ptr,
    temperature_stride: tl.int64,
    logprobs_ptr,
    kept_logits_ptr,
    stats_ptr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tokens = tl.num_programs(0)
    first, last, malformed = extent(offsets_ptr, 1, tokens, token, num_kept, token < tokens)
    if malformed | (first == last):
        result = tl.where(malformed, float("nan"), 0.0)
        tl.store(logprobs_ptr + token, result)
        tl.store(stats_ptr + 2 * token, result)
        tl.store(stats_ptr + 2 * token + 1, result)
        return
    target = tl.load(targets_ptr + token * targets_stride)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + token * temperature_stride)
    inverse = inverse_temperature(temperature)
    hidden_ptr += token * hidden_stride
    top = -INF
    total = 0.0
    chosen = 0.0
    found = 0.0
    for start in range(first, last, BLOCK_K):
        entry, inside, ids, legal = _entries(ids_ptr, start, last, vocab, BLOCK_K)
        products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        for column in range(0, hidden_size, BLOCK_H):
            columns = column + tl.arange(0, BLOCK_H)
            within = columns < hidden_size
            x = tl.load(hidden_ptr + columns, mask=within, other=0).to(tl.float32)
            pointers = weight_ptr + ids[:, None] * weight_stride + columns[None, :]
            w = tl.load(pointers, mask=legal[:, None] & within[None, :], other=0)
            products += w.to(tl.float32) * x[None, :]
        logits = tl.sum(products, 1)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + ids * bias_stride, mask=legal, other=0).to(tl.float32)
        logits = tl.where(legal, logits, float("nan"))
        tl.store(kept_logits_ptr + entry, logits, mask=inside)
        new_top = tl.maximum(top, tl.max(tl.where(inside, logits, -INF)))
        base = tl.where(new_top == -INF, 0.0, new_top)
        e = tl.where(inside, tl.exp((logits - base) * inverse), 0.0)
        total = total * tl.exp((top - base) * inverse) + tl.sum(e)
        top = new_top
        is_target = inside & (ids == target)
        chosen += tl.sum(tl.where(is_target, logits, 0.0))
        found += tl.sum(is_target.to(tl.float32))
    # no kept target: NaN for the gradient too
    log_sum = tl.where((found > 0) & (total > 0), tl.log(total), float("nan"))
    logprob = (chosen / tl.maximum(found, 1.0) - top) * inverse - log_sum
    tl.store(logprobs_ptr + token, tl.where(logprob > 0, 0.0, logprob))
    tl.store(stats_ptr + 2 * token, top)
    tl.store(stats_ptr + 2 * token + 1, log_sum)


@kernel()
def _kept_set_bwd_kernel(
    num_kept: tl.int64,
    vocab: tl.int64,
    hidden_size: tl.int64,
    weight_ptr,
    weight_stride: tl.int64,
    targets_ptr,
    targets_stride: tl.int64,
    ids_ptr,
    offsets_ptr,
    temperature: tl.float32,
    temperature_ptr,
    temperature_stride: tl.int64,
    kept_logits_ptr,
    stats_ptr,
    grad_logprobs_ptr,
    grad_logprobs_stride: tl.int64,
    grad_hidden_ptr,
    grad_hidden_stride: tl.int64,
    grad_logits_ptr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pieces = tl.cdiv(hidden_size, BLOCK_H)
    token = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    tokens = tl.num_programs(0) // pieces
    first, last, malformed = extent(offsets_ptr, 1, tokens, token, num_kept, token < tokens)
    target = tl.load(targets_ptr + token * targets_stride)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + token * temperature_stride)
    top = tl.load(stats_ptr + 2 * token)
    log_sum = tl.load(stats_ptr + 2 * token + 1)
    scale = inverse_temperature(temperature)
    grad = tl.load(grad_logprobs_ptr + token * grad_logprobs_stride) * scale
    columns = piece * BLOCK_H + tl.arange(0, BLOCK_H)
    within = columns < hidden_size
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_K):
        entry, inside, ids, legal = _entries(ids_ptr, start, last, vocab, BLOCK_K)
        logits = tl.load(kept_logits_ptr + entry, mask=inside, other=0)
        p = tl.exp((logits - top) * scale - log_sum)
        grads = grad * (tl.where(ids == target, 1.0, 0.0) - p)
        if piece == 0:
            tl.store(grad_logits_ptr + entry, grads, mask=inside)
        if grad_hidden_ptr is not None:
            grads = tl.where(inside, grads, 0.0)
            pointers = weight_ptr + ids[:, None] * weight_stride + columns[None, :]
            w = tl.load(pointers, mask=legal[:, None] & within[None, :], other=0)
            read = grads[:, None] != 0
            total += tl.sum(tl.where(read, grads[:, None] * w.to(tl.float32), 0.0), 0)
    if grad_hidden_ptr is not None:
        pointers = grad_hidden_ptr + token * grad_hidden_stride + columns
        tl.store(pointers, tl.where(malformed, float("nan"), total), mask=within)


@kernel()
def _kept_set_weight_kernel(
    hidden_size: tl.int64,
    hidden_ptr,
    hidden_stride: tl.int64,
    order_ptr,
    tokens_ptr,
    offsets_ptr,
    grad_logits_ptr,
    grad_weight_ptr,
    grad_weight_stride: tl.int64,
    grad_bias_ptr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pieces = tl.cdiv(hidden_size, BLOCK_H)
    row = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    first = tl.load(offsets_ptr + row)
    last = tl.load(offsets_ptr + row + 1)
    columns = piece * BLOCK_H + tl.arange(0, BLOCK_H)
    within = columns < hidden_size
    total = tl.zeros([BLOCK_H], tl.float32)
    bias = 0.0
    for start in range(first, last, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        inside = place < last
        entry = tl.load(order_ptr + place, mask=inside, other=0)
        grads = tl.load(grad_logits_ptr + entry, mask=inside, other=0)
        bias += tl.sum(grads)
        if grad_weight_ptr is not None:
            tokens = tl.load(tokens_ptr + place, mask=inside, other=0)
            read = grads[:, None] != 0
            pointers = hidden_ptr + tokens[:, None] * hidden_stride + columns[None, :]
            x = tl.load(pointers, mask=read & within[None, :], other=0).to(tl.float32)
            total += tl.sum(tl.where(read, grads[:, None] * x, 0.0), 0)
    if grad_bias_ptr is not None and piece == 0:
        tl.store(grad_bias_ptr + row, bias)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + row * grad_weight_stride + columns, total, mask=within)


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """Pointer and first stride; of an absent tensor, None and 0."""
    return (None, 0) if tensor is None else (tensor, tensor.stride(0))


def kept_set_logprobs_forward(a: KeptSetLogprobsArguments) -> None:
    if a.tokens == 0:
        return
    with torch.cuda.device_of(a.hidden):
        _kept_set_fwd_kernel[(a.tokens,)](
            a.num_kept,
            a.vocab,
            a.hidden_size,
            *_strided(a.hidden),
            *_strided(a.weight),
            *_strided(a.bias),
            *_strided(a.targets),
            a.kept_ids,
            a.kept_offsets,
            float(a.temperature),
            *_strided(a.token_temperature),
            a.logprobs,
            a.kept_logits,
            a.stats,
            BLOCK_K=BLOCK_K,
            BLOCK_H=BLOCK_H,
            num_warps=WARPS,
        )


def kept_set_logprobs_backward(a: KeptSetLogprobsBackwardArguments) -> None:
    f = a.forward
    if f.tokens == 0:
        return
    with torch.cuda.device_of(f.hidden):
        _kept_set_bwd_kernel[(f.tokens * triton.cdiv(f.hidden_size, BLOCK_H),)](
            f.num_kept,
            f.vocab,
            f.hidden_size,
            *_strided(f.weight),
            *_strided(f.targets),
            f.kept_ids,
            f.kept_offsets,
            float(f.temperature),
            *_strided(f.token_temperature),
            f.kept_logits,
            f.stats,
            *_strided(a.grad_logprobs),
            *_strided(a.grad_hidden),
            a.grad_logits,
            BLOCK_K=BLOCK_K,
            BLOCK_H=BLOCK_H,
            num_warps=WARPS,
        )


def kept_set_weight_gradient(a: KeptSetWeightGradientArguments) -> None:
    with torch.cuda.device_of(a.hidden):
        _kept_set_weight_kernel[(a.vocab * triton.cdiv(a.hidden_size, BLOCK_H),)](
            a.hidden_size,
            *_strided(a.hidden),
            a.order,
            a.tokens,
            a.offsets,
            a.grad_logits,
            *_strided(a.grad_weight),
            a.grad_bias,
            BLOCK_K=BLOCK_K,
            BLOCK_H=BLOCK_H,
            num_warps=WARPS,
        )
