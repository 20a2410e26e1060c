"""Attention of a packed row on a CPU, segment by segment of its trie: no gather, no padding.

A segment is a run of tokens that are followed by the same ones: tokens start to stop of the row,
followed by those up to end. Its keys are seen by its own tokens, causally, and whole by all that
follow it. In preorder these queries are one range of the row that begins with the segment, so a
segment is one product of torch's flash kernel, of q[start:end] and k, v[start:stop], with the
kernel's causal mask (query i sees keys j <= i). What a query sees of several segments is merged:

    lse = log(sum_s exp(lse_s) + exp(sink)),    out = sum_s exp(lse_s - lse) out_s

lse_s being the log-sum-exp of its scores in segment s. The gradient of a segment's product takes
the whole out and lse, which are all that is kept (https://arxiv.org/abs/2205.14135, algorithm 4).
The shared prompt of a group is read once for all of its completions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpo.engine.models.batch import Segments

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def trie_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax([scaling q k^T, sink])[:-1] v over the tokens that each token continues and itself.

    Args:
        query: (1, heads, N, D).  key, value: (1, kv heads, N, D).
        segments: of the row, as in `Batch`.
        scaling: D^-1/2 where it is None.
        sinks: (heads,), a logit next to those of the keys, which has no value.

    Returns:
        (1, N, heads, D).
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out: Tensor = _TrieAttention.apply(query, key, value, sinks, segments, scale)
    return out


class _TrieAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Segments,
        scale: float,
    ) -> Tensor:
        inputs = query, key, value, sinks
        query, key, value = _by_kv_heads(query, key, value)
        kv_heads, groups, tokens, size = query.shape
        # rounded to a narrower dtype once, and not with each segment
        sums = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(tokens, kv_heads, groups, size, dtype=sums).permute(1, 2, 0, 3)
        lse = query.new_empty(tokens, kv_heads, groups, dtype=sums).permute(1, 2, 0)
        covered = 0
        for start, stop, end in segments:
            rows, keys = slice(start, end), slice(start, stop)
            part, part_lse = _forward(
                query[:, :, rows], key[:, :, keys], value[:, :, keys], 0.0, True, scale=scale
            )
            if start == covered:  # a root: nothing came before it
                out[:, :, rows], lse[:, :, rows] = part, part_lse
                covered = end
            else:
                _merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
        if sinks is not None:
            total = torch.logaddexp(lse, _by_head(sinks, lse))
            out.mul_((lse - total).exp_().unsqueeze(-1))
            lse = total
        out = out.to(query.dtype)
        ctx.segments, ctx.scale = segments, scale
        ctx.save_for_backward(*inputs, out, lse)
        return out.permute(2, 0, 1, 3).reshape(1, tokens, kv_heads * groups, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, sinks, out, lse = ctx.saved_tensors
        # torch's backward kernel of bfloat16 takes three times as long as that of float32
        query, key, value = _by_kv_heads(*(x.to(lse.dtype) for x in inputs))
        kv_heads, groups, tokens, size = query.shape
        grad, out = grad.to(lse.dtype), out.to(lse.dtype)
        grad = grad.reshape(tokens, kv_heads, groups, size).permute(1, 2, 0, 3)
        grad_query = torch.empty_like(query)
        grad_key = query.new_empty(tokens, kv_heads, size).transpose(0, 1)
        grad_value = torch.empty_like(grad_key)
        covered = 0
        for start, stop, end in ctx.segments:
            rows, keys = slice(start, end), slice(start, stop)
            part, part_key, part_value = _backward(
                grad[:, :, rows],
                query[:, :, rows],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                True,
                scale=ctx.scale,
            )
            # every key is of one segment
            grad_key[:, keys], grad_value[:, keys] = part_key.sum(1), part_value.sum(1)
            if start == covered:
                grad_query[:, :, rows] = part
                covered = end
            else:
                grad_query[:, :, rows] += part
        grad_sinks = None
        if sinks is not None:
            weight = (_by_head(sinks, lse) - lse).exp_()
            delta = (grad * out).sum(-1)
            grad_sinks = -(weight * delta).sum(-1).flatten().to(sinks.dtype)
        grad_query = grad_query.view(1, kv_heads * groups, tokens, size)
        grads = (x.to(inputs[0].dtype) for x in (grad_query, grad_key[None], grad_value[None]))
        return *grads, grad_sinks, None, None


def _by_kv_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(kv heads, queries of each, N, D) of all three, without a copy."""
    query = query[0].unflatten(0, (key.shape[1], -1))
    shape = query.shape
    return query, key[0].unsqueeze(1).expand(shape), value[0].unsqueeze(1).expand(shape)


def _by_head(sinks: Tensor, lse: Tensor) -> Tensor:
    return sinks.to(lse.dtype).view(*lse.shape[:2], 1)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add what queries see of one more segment."""
    share = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    out.lerp_(part.to(out.dtype), share)
    lse.copy_(torch.logaddexp(lse, part_lse))
