"""Attention within each sequence of a packed row, instead of a model's own attention.

transformers lets a model's attention and its masks be replaced by name. The mask stays the model's
own function of two places (causal, sliding window, chunks); here it is evaluated on the places of a
sequence instead of on those of the row. Soft caps and attention sinks follow the eager formula:

    s = scaling q k^T,   s <- c tanh(s / c) where there is a cap c
    out = softmax([s, sink])[:-1] v     where a head has a sink, a logit next to those of the keys
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from warpo.engine.models.batch import Segments
from warpo.engine.models.flex import MaskFunction, block_mask, row_attention, runs_flex
from warpo.engine.models.trie_attention import trie_attention

ATTENTION = "warpo_packed"

# Multiply-adds of the padded batch that take as long as a call for one segment, on one core.
SEGMENT_WORK = 2**19

# What models hand through to their attention and no attention computes with.
_IGNORED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


class UnsupportedAttention(ValueError):
    """The model asks of its attention what the packed one does not compute."""


class Mask:
    """A model's mask of one kind of layers, for sequences of any length; of one forward pass.

    Args:
        function: (batch, head, query place, key place) -> whether it is seen.
        local_size: window or chunk; shorter sequences are causal. None: not known.
    """

    def __init__(self, function: MaskFunction, local_size: int | None) -> None:
        self._function, self._local_size = function, local_size
        self._made: Tensor | None = None
        self._blocks: BlockMask | None = None

    def hiding(self, length: int) -> MaskFunction | None:
        """The function; None where it hides only later tokens from sequences of that length."""
        causal = self._function is causal_mask_function
        if causal or (self._local_size is not None and length <= self._local_size):
            return None
        return self._function

    def of(self, length: int, device: torch.device) -> Tensor | None:
        """(length, length) bool; None where it is causal and nothing else."""
        function = self.hiding(length)
        if function is not None and self._made is None:
            places = torch.arange(length, device=device)
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            self._made = function(zero, zero, places[:, None], places[None, :])
        return self._made

    def blocks(self, length: int, subtree_end: Tensor, depths: Tensor) -> BlockMask:
        """The blocks of a packed row, made for the first layer that asks."""
        if self._blocks is None:
            self._blocks = block_mask(self.hiding(length), subtree_end, depths)
        return self._blocks


def _make_mask(
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: object,
) -> Mask:
    """A mask of transformers' interface of masks; sizes are those of the row."""
    if attention_mask is None:
        # the function would keep the row's sequences apart, by its own places
        raise UnsupportedAttention("a packed row without attention_mask, see model.inputs_of")
    if use_vmap:
        raise UnsupportedAttention("a mask of its own besides the causal one")
    return Mask(mask_function, local_size)


# It decides by sizes and sets hooks in the graph: compiled layers call it as it is.
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    *,
    gather_index: Tensor | None = None,
    scatter_index: Tensor | None = None,
    subtree_end: Tensor | None = None,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row; the interface of transformers' attentions.

    Args:
        query: (1, heads, N, D).  key: (1, kv heads, N, D).  value: (1, kv heads, N, D').
        attention_mask: the model's own, as `_make_mask` made it; a window is part of it.
        gather_index, scatter_index, subtree_end, segments: as in `Batch`.
        softcap: c.  s_aux: (heads,), the sinks.

    Returns:
        (1, N, heads, D'), and None instead of attention weights.

    Raises:
        UnsupportedAttention: the model asks for anything else.
    """
    if gather_index is None or scatter_index is None or subtree_end is None or segments is None:
        raise UnsupportedAttention("no keywords of its caller (gather_index, scatter_index)")
    if not isinstance(attention_mask, Mask):
        raise UnsupportedAttention("a mask of its own instead of transformers' causal ones")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("attention to later tokens (is_causal is False)")
    for name, option in others.items():
        if name not in _IGNORED and option is not None and option is not False:
            raise UnsupportedAttention(f"{name} = {_text(option)} in its attention")
    if dropout:
        raise UnsupportedAttention(f"dropout = {dropout:g} in its attention")
    longest = gather_index.shape[1]
    plain = softcap is None and attention_mask.hiding(longest) is None
    path = _path(query, value, gather_index, segments, plain=plain)
    if path == "blocks":
        blocks = attention_mask.blocks(longest, subtree_end, scatter_index % longest)
        out = row_attention(query, key, value, blocks, scaling, softcap, s_aux)
        return out.transpose(1, 2), None
    if path == "segments":
        return trie_attention(query, key, value, segments, scaling, s_aux), None
    out = padded_attention(
        query,
        key,
        value,
        gather_index,
        scatter_index,
        mask=attention_mask.of(longest, query.device),
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return out, None


def _path(
    query: Tensor,
    value: Tensor,
    gather_index: Tensor,
    segments: Segments,
    *,
    plain: bool,
) -> Literal["blocks", "segments", "padded"]:
    """The way to compute it, by what each can do and what it costs.

    blocks: FlexAttention, compiled, on a GPU.
    segments: torch's flash kernel on the segments of the trie, on a CPU, where only causality hides
        tokens and a segment is not too short for a call of its own.
    padded: their definition, which can do all.

    Args:
        plain: no window or chunk that hides tokens, no soft cap.
    """
    if runs_flex(query, value):
        return "blocks"
    if query.is_cuda or not plain or query.shape[3] != value.shape[3]:
        return "padded"
    sequences, longest = gather_index.shape
    work = sequences * longest**2 * query.shape[1] * query.shape[3]
    return "segments" if work >= SEGMENT_WORK * len(segments) else "padded"


@contextmanager
def segments_of_any_length() -> Iterator[None]:
    """Pad no row because its segments are short."""
    global SEGMENT_WORK
    work, SEGMENT_WORK = SEGMENT_WORK, 0
    try:
        yield
    finally:
        SEGMENT_WORK = work


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gather_index: Tensor,
    scatter_index: Tensor,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(1, N, heads, D'): the row cut into a padded batch of whole sequences.

    Padding follows the tokens, where the causal mask hides it. With a soft cap or sinks the
    B x heads x T^2 scores are held.

    Args:
        mask: (T, T) bool; None: causal.
    """
    heads = query.shape[1]

    def unpack(x: Tensor) -> Tensor:
        rows = _take(x[0].transpose(0, 1).flatten(1), gather_index.flatten())
        return rows.view(*gather_index.shape, x.shape[1], x.shape[3]).transpose(1, 2)

    if softcap is None and sinks is None:
        out = _attention(
            unpack(query),
            unpack(key),
            unpack(value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=heads != key.shape[1],
        )
    else:
        out = _by_formula(unpack(query), unpack(key), unpack(value), mask, scaling, softcap, sinks)
    rows = _take(out.transpose(1, 2).flatten(2).flatten(0, 1), scatter_index)
    return rows.view(1, -1, heads, value.shape[3])


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention, with a gradient that is the same in every run.

    On a GPU the backward of the flash and the memory-efficient kernel add with atomics unless
    deterministic algorithms are asked for, and that of cuDNN always may.
    """
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        out = F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    node = out.grad_fn
    # Not where it is composed of products: cuBLAS would ask for a workspace of its own.
    if node is not None and "ScaledDotProduct" in node.name():
        backward_is_deterministic(node)
    return out


def backward_is_deterministic(node: Any) -> None:
    """Let the backward pass of one node of the graph, and no other, take the algorithms of
    `torch.use_deterministic_algorithms`.
    """
    # a module that answers by property, which its stub does not have
    fill: Any = torch.utils.deterministic
    before: list[tuple[int, bool]] = []

    def start(_: object) -> None:
        before.append((torch.get_deterministic_debug_mode(), fill.fill_uninitialized_memory))
        # what is written whole need not be filled first
        fill.fill_uninitialized_memory = False
        torch.set_deterministic_debug_mode("error")

    def stop(*_: object) -> None:
        mode, fill.fill_uninitialized_memory = before.pop()
        torch.set_deterministic_debug_mode(mode)

    node.register_prehook(start)
    node.register_hook(stop)


def _by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(B, heads, T, D'): the formula at the top, the softmax in float32 at least."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights[..., : key.shape[2]].to(value.dtype)
    return weights @ value


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], with a gradient that is the same in every run.

    A shared prompt is taken several times, so its gradient is a sum: on a GPU the backward of
    index_select adds with atomics, in any order, and that of an index sorts first.
    """
    return rows[index] if rows.is_cuda else rows.index_select(0, index)


def _text(option: object) -> str:
    return f"a tensor of {tuple(option.shape)}" if isinstance(option, Tensor) else str(option)[:60]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _make_mask)
