"""Attention of a packed row on a GPU: FlexAttention, compiled, over the blocks of the trie's mask.

No token is gathered or padded: token i sees token j of the row where

    j <= i < subtree_end[j]   and the model's own mask, of the depths of both, says so

The blocks of the row that this leaves, and those of which it leaves all, are found once per
micro-batch and kind of mask (https://arxiv.org/abs/2412.05496). Soft caps are a change of the
scores, sinks a factor of what comes out:

    s <- c tanh(s / c)            out <- out sigmoid(lse - sink)

lse being the log-sum-exp of a token's scores. Every gradient is added in one order: the kernel of
queries goes over keys, that of keys over queries, without atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

MaskFunction = Callable[..., Tensor]

# The block that the kernels skip by, and the rows whose mask is made at once.
BLOCK = 128
ROWS = 16 * BLOCK
# Kernels of one process.
COMPILATIONS = 64
# The kernels' smallest head.
MIN_HEAD = 16


def runs_flex(query: Tensor, value: Tensor) -> bool:
    """True if the compiled kernels take these: on a GPU, not in float64, heads of 16 at least."""
    narrow = min(query.shape[3], value.shape[3]) < MIN_HEAD
    return query.is_cuda and query.dtype != torch.float64 and not narrow


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax([s, sink])[:-1] v over the tokens that each token sees.

    Args:
        query: (1, heads, N, D).  key: (1, kv heads, N, D).  value: (1, kv heads, N, D').
        blocks: of `block_mask`.
        softcap: c.  sinks: (heads,).

    Returns:
        (1, heads, N, D').
    """
    if isinstance(query, FakeTensor):
        out, lse = _Shapes.apply(query, key, value)
    else:
        found = _compiled()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=blocks,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
        out, lse = (found, None) if sinks is None else (found[0], found[1].lse)
    if sinks is None:
        return out
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
    return (out * share.unsqueeze(-1)).to(value.dtype)


def block_mask(function: MaskFunction | None, subtree_end: Tensor, depths: Tensor) -> BlockMask:
    """The mask of a packed row in blocks of BLOCK x BLOCK tokens.

    Args:
        function: the model's own, (batch, head, query place, key place) -> whether it is seen, of
            the places in a sequence; None: all that came before is seen.
        subtree_end: (N,) int64, as in `Batch`.
        depths: (N,) int64, place of each token in its sequences.
    """

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        continued = (j <= i) & (i < subtree_end[j])
        if function is None:
            return continued
        return continued & function(batch, head, depths[i], depths[j])

    tokens, device = len(subtree_end), subtree_end.device
    zero, places = torch.zeros((), dtype=torch.int64, device=device), torch.arange(tokens)
    places = places.to(device)
    some, whole = [], []
    for start in range(0, tokens, ROWS):
        rows = places[start : start + ROWS]
        tile = seen(zero, zero, rows[:, None], places[None, :])
        tile = F.pad(tile, (0, -tokens % BLOCK, 0, -len(rows) % BLOCK))
        tile = tile.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        some.append(tile.any(3).any(1))
        whole.append(tile.all(3).all(1))
    full = torch.cat(whole)
    part = torch.cat(some) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(part),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, rows) int32 and (1, 1, rows, columns) int32: how many blocks of a row are set, and
    their columns, those that are set first.
    """
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


@cache
def _compiled() -> Any:
    """Compiled for the first row's length, then once for any; a whole graph or an error, and never
    the unfused formula.
    """
    # a model, dtype or kind of mask each, with and without gradient
    limit = max(COMPILATIONS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.recompile_limit = limit
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


class _Shapes(torch.autograd.Function):
    """What the kernels keep and make, for a plan of memory, which runs on fake tensors."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        delta = torch.empty_like(lse)  # of each query, read by both kernels
        del out, lse, delta
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
