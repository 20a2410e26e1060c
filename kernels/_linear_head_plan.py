"""How the tokens go through a linear head: how many at a time, in which dtypes, at which strides.
All of it follows from sizes, dtypes and the type of the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# 64 MiB hold 96 tokens of a vocabulary of 151936 in float32: enough for a CPU's matrix product.
CPU_WORKSPACE_BYTES = 64 << 20
# Of a card of 64 GiB or more, else a sixteenth of its memory: 8192 tokens of a vocabulary of
# 151936, whose gradients of the logits are multiplied at once.
CUDA_WORKSPACE_BYTES = 4 << 30
CUDA_SHARE = 16

# The tiles of a GPU's matrix products have 128 rows or columns, and so many tokens fill it.
TILE, GPU_TOKENS = 128, 1024
# Tensor cores are fed 16 bytes at a time: where a stride is no multiple of them, cuBLAS takes
# kernels that are 1.5 to 4 times slower.
ALIGNMENT = 8

# What gradients of the logits a head has room for: "over" the logits, where their dtypes allow it.
NONE, OVER, APART = "none", "over", "apart"


class Request(NamedTuple):
    """What a plan follows from. gradients: NONE | OVER | APART; kept: the logits of all tokens are,
    elsewhere, and the head has no room for any; mixes: products take operands of two dtypes.
    """

    num_tokens: int
    vocab: int
    hidden_size: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    workspace_bytes: int
    on_cpu: bool
    mixes: bool
    softcap: bool
    gradients: str
    kept: bool


class Plan(NamedTuple):
    tokens: int
    """of a chunk, whose logits are computed at a time"""
    block: int
    """tokens whose gradients are multiplied at a time"""
    columns: int
    """of weight and gradients of the logits that are converted at a time, on a CPU"""
    stride: int
    """elements from row to row of the logits and of their gradients"""
    product_dtype: torch.dtype
    """of the operands"""
    gradient_dtype: torch.dtype
    """of the gradients of the logits"""
    apart: bool
    """the gradients of the logits have a buffer of their own"""
    scratch_bytes: int
    """for what is computed element by element"""


def plan(request: Request) -> Plan:
    return _plan_on_cpu(request) if request.on_cpu else _plan_on_gpu(request)


def row_stride(vocab: int, on_cpu: bool) -> int:
    return vocab if on_cpu else _up(vocab, ALIGNMENT)


def _plan_on_cpu(r: Request) -> Plan:
    low = r.dtype != torch.float32 and not r.mixes
    # what is left is for converted parts, and for the copies that BLAS makes of its operands
    share = r.workspace_bytes // 8 * (6 if low or r.softcap else 7)
    buffers = max(1, (not r.kept) + (r.gradients == APART))
    per_token = r.vocab * r.logits_dtype.itemsize * buffers
    room = r.workspace_bytes // per_token if r.kept else share // (per_token + 8 * r.hidden_size)
    tokens = _split(r.num_tokens, max(1, min(room, r.num_tokens)))
    columns, left = r.vocab, r.workspace_bytes - share
    if low:
        columns = max(1, min(left // (12 * tokens + 4 * r.hidden_size), r.vocab))
    return Plan(
        tokens=tokens,
        block=tokens,
        columns=columns,
        stride=r.vocab,
        # BLAS of a CPU sums in the dtype of its operands
        product_dtype=r.dtype if r.mixes else torch.float32,
        gradient_dtype=r.logits_dtype,
        apart=r.gradients == APART,
        scratch_bytes=left,
    )


def _plan_on_gpu(r: Request) -> Plan:
    """A chunk is of some thousand tokens at most, a block of all whose gradients find room: the
    gradient of the weight is summed over a block within the product, and from block to block in
    float32, which reads and writes all of it.
    """
    stride = row_stride(r.vocab, False)
    apart = r.gradients == APART or (r.gradients == OVER and r.logits_dtype != r.dtype)
    scratch = r.workspace_bytes // 8
    room = r.workspace_bytes - scratch
    of_logits = 0 if r.kept else stride * r.logits_dtype.itemsize
    # beside the gradients of the logits, hidden states and their gradients
    of_block = stride * r.dtype.itemsize * apart + 8 * r.hidden_size
    tokens = block = room // (of_logits + of_block)
    if apart and of_logits and tokens > GPU_TOKENS:
        tokens = GPU_TOKENS
        block = (room - tokens * of_logits) // of_block
    elif r.kept and not apart:
        block = r.num_tokens
    block = _split(r.num_tokens, _down(min(block, r.num_tokens), r.num_tokens))
    if not (apart and of_logits):
        tokens = block
    return Plan(
        tokens=_split(block, _down(min(tokens, block), block)),
        block=block,
        columns=r.vocab,
        stride=stride,
        product_dtype=r.dtype,
        gradient_dtype=r.dtype,
        apart=apart,
        scratch_bytes=scratch,
    )


def _split(count: int, most: int) -> int:
    """Tokens of each part, `most` at most: parts of about one size, of whole tiles like `most`."""
    parts = max(1, -(-count // most))
    tokens = max(1, -(-count // parts))
    return tokens if parts == 1 or most % TILE else _up(tokens, TILE)


def _down(tokens: int, count: int) -> int:
    """In whole tiles, unless it is all or not one tile."""
    tokens = max(1, tokens)
    return tokens if tokens >= count or tokens < TILE else tokens // TILE * TILE


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_chunking(
    hidden: Tensor, num_valid: int | None, workspace_bytes: int | None, logits_dtype: str
) -> tuple[int, int, bool]:
    """num_valid or -1, the bytes, whether the logits are float32."""
    if logits_dtype not in ("float32", "input"):
        raise ValueError(f"logits_dtype must be one of float32, input; got {logits_dtype!r}")
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden.device)
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes}")
    if num_valid is not None and num_valid < 0:
        raise ValueError(f"num_valid must be >= 0, got {num_valid}")
    return -1 if num_valid is None else num_valid, workspace_bytes, logits_dtype == "float32"


def default_workspace_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    return min(CUDA_WORKSPACE_BYTES, _memory_bytes(device.index) // CUDA_SHARE)


def _memory_bytes(card: int | None) -> int:
    return torch.cuda.get_device_properties(card).total_memory


# what torch.compiler.assume_constant_result does, which loads the compiler, and with it Triton
setattr(_memory_bytes, "_dynamo_marked_constant", True)  # noqa: B010
