"""AdamW rounded into the published weights in one pass, of all tensors whose dtypes are alike; a
last launch adds up the counts.

The published weights pass as bits: they are what the fingerprint reads, and Triton's interpreter
would truncate where a GPU rounds.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.adamw_publish import AdamwPublishArguments, AdamwTensorArguments
from warpo.kernels._triton.fingerprint import (
    INCREMENT,
    fingerprint_terms,
    offset_of,
    pointer,
    shape_of,
    splitmix64,
    unsigned,
)
from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.tables import send

BLOCK = 1024
MAX_PROGRAMS = 1024
WARPS = 8

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def _round_to_bits(value, DTYPE: tl.constexpr):
    """To the nearest, ties to even; the bits as uint32."""
    bits = value.to(tl.uint32, bitcast=True)
    if DTYPE == BFLOAT16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, rounded, 0x7FC0)
    elif DTYPE == FLOAT16:
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits


@triton.jit
def _round_at_random(value, random):
    """To bfloat16, up or down, by the 16 low bits of `random`; the bits as uint32."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF).to(tl.uint32)) >> 16
    return tl.where(value == value, rounded, 0x7FC0)


@triton.jit
def _load_moment(pointers, inside):
    moment = tl.load(pointers, mask=inside, other=0)
    if moment.dtype == tl.int16:
        moment = _value_of(unsigned(moment), BFLOAT16)
    return moment


@triton.jit
def _store_moment(pointers, value, random, inside, STOCHASTIC: tl.constexpr):
    if pointers.dtype.element_ty == tl.int16:
        bits = _round_at_random(value, random) if STOCHASTIC else _round_to_bits(value, BFLOAT16)
        tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


@triton.jit
def _value_of(bits, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE == FLOAT16:
        value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def _floats(address, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        result = address.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == FLOAT16:
        result = address.to(tl.pointer_type(tl.float16))
    else:
        result = address.to(tl.pointer_type(tl.float32))
    return result


@kernel()
def _adamw_publish_kernel(
    addresses_ptr,
    numbers_ptr,
    decay: tl.float32,
    grad_weight: tl.float32,
    beta2: tl.float32,
    square_weight: tl.float32,
    eps: tl.float32,
    grad_scale: tl.float32,
    grad_scale_factor_ptr,
    partial_counts_ptr,
    partial_updates_ptr,
    STOCHASTIC: tl.constexpr,
    MASTER: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = addresses_ptr + COLUMNS * tl.program_id(1).to(tl.int64)
    stride, columns, size = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    seed, step = tl.load(row + 8), tl.load(row + 9)
    published_ptr = pointer(tl.load(row), 4 if DTYPE == 0 else 2)
    grad_ptr = _floats(tl.load(row + 1), GRAD)
    master_ptr = _floats(tl.load(row + 2), 0)
    if MOMENTS == BFLOAT16:
        exp_avg_ptr, exp_avg_sq_ptr = pointer(tl.load(row + 3), 2), pointer(tl.load(row + 4), 2)
    else:
        exp_avg_ptr, exp_avg_sq_ptr = _floats(tl.load(row + 3), 0), _floats(tl.load(row + 4), 0)
    step_size = tl.load(numbers_ptr + 2 * tl.program_id(1))
    root_scale = tl.load(numbers_ptr + 2 * tl.program_id(1) + 1)
    program = tl.program_id(0).to(tl.int64)
    if grad_scale_factor_ptr is not None:
        grad_scale *= tl.load(grad_scale_factor_ptr)
    key = splitmix64((seed.to(tl.uint64) + 1) * INCREMENT)
    key = splitmix64(key + step.to(tl.uint64) * INCREMENT)
    PER_WORD: tl.constexpr = 2 if DTYPE == 0 else 4
    fingerprint = tl.zeros([BLOCK // PER_WORD], tl.int64)
    changed = tl.zeros([BLOCK], tl.int64)
    master_update = tl.zeros([BLOCK], tl.float32)
    published_update = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, (size + BLOCK - 1) // BLOCK, tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32) * grad_scale
        exp_avg = _load_moment(exp_avg_ptr + at, inside)
        exp_avg_sq = _load_moment(exp_avg_sq_ptr + at, inside)
        random = splitmix64(key + (at + 1).to(tl.uint64) * INCREMENT)
        pointers = published_ptr + offset_of(at, columns, size, stride)
        before = unsigned(tl.load(pointers, mask=inside, other=0))
        if not MASTER:
            old = _value_of(before, DTYPE)
        else:
            old = tl.load(master_ptr + at, mask=inside, other=0)

        exp_avg += grad_weight * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + square_weight * (grad * grad)
        root = tl.sqrt_rn(exp_avg_sq) * root_scale + eps
        new = decay * old - step_size * tl.div_rn(exp_avg, root)
        if STOCHASTIC and not MASTER and DTYPE == BFLOAT16:
            bits = _round_at_random(new, random)
        else:
            bits = _round_to_bits(new, DTYPE)
        bits = tl.where(inside, bits, 0)

        if MASTER:
            tl.store(master_ptr + at, new, mask=inside)
        _store_moment(exp_avg_ptr + at, exp_avg, random >> 16, inside, STOCHASTIC)
        _store_moment(exp_avg_sq_ptr + at, exp_avg_sq, random >> 32, inside, STOCHASTIC)
        if DTYPE == 0:
            tl.store(pointers, bits.to(tl.int32, bitcast=True), mask=inside)
        else:
            tl.store(pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        fingerprint += fingerprint_terms(tile, size, bits, PER_WORD, BLOCK)
        changed += (inside & (bits != before)).to(tl.int64)
        master_update += tl.where(inside, tl.abs(new - old), 0.0)
        difference = _value_of(bits, DTYPE) - _value_of(before, DTYPE)
        published_update += tl.where(inside, tl.abs(difference), 0.0)
    partial = 2 * (tl.load(row + 10) * MAX_PROGRAMS + program)
    tl.store(partial_counts_ptr + partial, tl.sum(fingerprint))
    tl.store(partial_counts_ptr + partial + 1, tl.sum(changed))
    tl.store(partial_updates_ptr + partial, tl.sum(master_update))
    tl.store(partial_updates_ptr + partial + 1, tl.sum(published_update))


@kernel()
def _adamw_sum_kernel(
    addresses_ptr,
    partial_counts_ptr,
    partial_updates_ptr,
    tensors: tl.int64,
    counts_ptr,
    updates_ptr,
    COLUMNS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = addresses_ptr + COLUMNS * tl.program_id(0).to(tl.int64)
    size, tensor = tl.load(row + 7), tl.load(row + 10)
    part = tl.arange(0, MAX_PROGRAMS)
    exists = part < (size + BLOCK - 1) // BLOCK
    partial = 2 * (tensor * MAX_PROGRAMS + part)
    for which in tl.static_range(2):
        counts = tl.load(partial_counts_ptr + partial + which, mask=exists, other=0)
        updates = tl.load(partial_updates_ptr + partial + which, mask=exists, other=0.0)
        tl.store(counts_ptr + which * tensors + tensor, tl.sum(counts))
        tl.store(updates_ptr + which * tensors + tensor, tl.sum(updates))


# of the table of addresses
COLUMNS = 11


def adamw_publish(a: AdamwPublishArguments) -> None:
    alike: dict[tuple[int, int, int, bool], list[int]] = {}
    for i, x in enumerate(a.tensors):
        published, grad, moments = (DTYPES[t.dtype] for t in (x.published, x.grad, x.exp_avg))
        kind = (published, grad, moments, x.master is not None)
        alike.setdefault(kind, []).append(i)
    with torch.cuda.device_of(a.counts):
        for kind, places in alike.items():
            _update(a, places, kind)


def _row(x: AdamwTensorArguments, place: int) -> tuple[int, ...]:
    addresses = [t.data_ptr() for t in (x.published, x.grad, x.exp_avg, x.exp_avg_sq)]
    addresses.insert(2, 0 if x.master is None else x.master.data_ptr())
    return (*addresses, *shape_of(x.published), x.seed, x.step, place)


def _update(
    a: AdamwPublishArguments, places: Sequence[int], kind: tuple[int, int, int, bool]
) -> None:
    rows = [_row(a.tensors[i], i) for i in places]
    scales = [(a.tensors[i].step_size, a.tensors[i].root_scale) for i in places]
    addresses = send(rows, torch.int64, "adamw_publish", a.counts)
    most = max(row[7] for row in rows)
    numbers = (a.decay, a.grad_weight, a.beta2, a.square_weight, a.eps, a.grad_scale)
    published, grad, moments, master = kind
    _adamw_publish_kernel[(max(1, min(MAX_PROGRAMS, triton.cdiv(most, BLOCK))), len(rows))](
        addresses,
        send(scales, torch.float32, "adamw_publish", a.counts),
        *map(float, numbers),
        a.grad_scale_factor,
        a.partial_counts,
        a.partial_updates,
        STOCHASTIC=bool(a.stochastic),
        MASTER=master,
        DTYPE=published,
        GRAD=grad,
        MOMENTS=moments,
        COLUMNS=COLUMNS,
        MAX_PROGRAMS=MAX_PROGRAMS,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    _adamw_sum_kernel[(len(rows),)](
        addresses,
        a.partial_counts,
        a.partial_updates,
        len(a.tensors),
        a.counts,
        a.updates,
        COLUMNS=COLUMNS,
        MAX_PROGRAMS=MAX_PROGRAMS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
