"""Settings against each other, and parts of the engine's step against plain PyTorch."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from warpo.bench.gpu.goals import GOALS
from warpo.bench.limits import bound
from warpo.bench.operation import Function, Inputs, Provider, Work
from warpo.bench.operations import OPERATIONS
from warpo.bench.report.rows import Row
from warpo.bench.suite import Plan, rows_of
from warpo.bench.timing import Call, host_us, measure, peak_bytes, spread
from warpo.kernels import ops

_HEAD = "policy_loss_from_hidden"


def head(plan: Plan) -> Iterator[Row]:
    """The loss from hidden states by workspace and dtype of its logits."""
    others = {
        f"warpo, {gib} GiB, logits {dtype}": Provider(load=partial(_head_with, gib, dtype))
        for gib in (1, 4)
        for dtype in ("float32", "input")
    }
    goal = next(goal for goal in GOALS if goal.operation == _HEAD)
    operation = dataclasses.replace(OPERATIONS[_HEAD], eager=None, others=others)
    point = dataclasses.replace(goal.point(plan.device), operation=operation)
    wanted = dataclasses.replace(plan, wanted=lambda point, name: name in others)
    yield from rows_of(point, wanted)


def _head_with(gib: int, logits_dtype: str) -> Function:
    def call(inputs: Inputs) -> Tensor:
        hidden = inputs["hidden"]
        return ops.policy_loss_from_hidden(
            hidden,
            inputs["weight"],
            inputs["targets"],
            inputs["advantages"],
            "dapo",
            old_logprobs=inputs["old_logprobs"],
            cu_seqlens=torch.tensor([0, len(hidden)], dtype=torch.int32, device=hidden.device),
            workspace_bytes=gib << 30,
            logits_dtype=logits_dtype,
        ).loss

    return call


def _parameter_shapes(plan: Plan) -> list[tuple[int, ...]]:
    """Those of Qwen2.5-1.5B: 338 tensors."""
    hidden, inner, kv, vocabulary, layers = (1536, 8960, 256, 151936, 28)
    if plan.device == "cpu":
        hidden, inner, kv, vocabulary, layers = (32, 64, 16, 100, 2)
    layer = [
        *((hidden, hidden), (hidden,), (kv, hidden), (kv,), (kv, hidden), (kv,)),
        *((hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)),
        *((hidden,), (hidden,)),
    ]
    return [(vocabulary, hidden), (hidden,), *(layers * layer)]


def optimizer(plan: Plan) -> Iterator[Row]:
    """A step of the engine's AdamW over the tensors of a model, whose gradients are float32, and of
    torch's, fused, on float32 weights that are then rounded.
    """
    from warpo.engine.learner.optimizer import AdamW

    low = torch.bfloat16
    weights = [
        nn.Parameter(torch.randn(shape, device=plan.device).mul_(0.02).to(low))
        for shape in _parameter_shapes(plan)
    ]
    gradients = [torch.randn_like(weight, dtype=torch.float32) for weight in weights]
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    mine = AdamW([(f"p{i}", weight) for i, weight in enumerate(weights)], lr=1e-6)
    theirs = torch.optim.AdamW(masters, lr=1e-6, fused=plan.device == "cuda")

    def ours() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        mine.step(1.0)

    @torch.no_grad()
    def eager() -> None:
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        nn.utils.clip_grad_norm_(masters, 1.0)
        theirs.step()
        torch._foreach_copy_(list[Tensor](weights), list[Tensor](masters))

    total = sum(weight.numel() for weight in weights)
    # as of adamw_publish with a float32 gradient, and that once more for its norm
    work = Work(read=22 * total, written=14 * total)
    sizes = {"tensors": len(weights), "parameters": total}
    yield from _timed(plan, "optimizer step", sizes, {plan.device: ours, "eager": eager}, work)


def attention(plan: Plan) -> Iterator[Row]:
    """Forward and backward of the engine's attention of a packed row, of the padded batch that
    defines it, and of the same product on a batch that nobody had to gather.
    """
    from transformers.masking_utils import causal_mask_function

    from warpo.engine.models.attention import Mask, packed_attention, padded_attention
    from warpo.engine.models.batch import pack
    from warpo.engine.types import TokenSequence

    batch, length, heads, kv, width = (16, 1024, 12, 2, 128)
    if plan.device == "cpu":
        batch, length, heads, kv, width = (2, 16, 4, 2, 8)
    # sequences that begin differently share nothing
    rows = [TokenSequence.scored([number] * length) for number in range(batch)]
    packed = pack(rows).to(plan.device)
    causal = Mask(cast(Callable[..., Tensor], causal_mask_function), None)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=plan.device, dtype=torch.bfloat16).requires_grad_()

    row = [leaf(1, count, batch * length, width) for count in (heads, kv, kv)]
    padded = [leaf(batch, count, length, width) for count in (heads, kv, kv)]
    index: dict[str, Any] = {
        "gather_index": packed.gather_index,
        "scatter_index": packed.scatter_index,
    }

    def ours() -> None:
        query, key, value = row
        out, _ = packed_attention(
            nn.Module(),
            query,
            key,
            value,
            causal,
            **index,
            subtree_end=packed.subtree_end,
            segments=packed.segments,
        )
        torch.autograd.grad(out.sum(), row)

    def gathered() -> None:
        out = padded_attention(*row, **index)
        torch.autograd.grad(out.sum(), row)

    def eager() -> None:
        query, key, value = padded
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        torch.autograd.grad(out.sum(), padded)

    # two products forward and five backward, over the half that the causal mask leaves
    work = Work(read=sum(x.nbytes for x in row), flops=7 * batch * heads * length * length * width)
    sizes = {"sequences": batch, "steps": length, "heads": heads}
    calls: dict[str, Call] = {plan.device: ours, "padded": gathered, "eager": eager}
    yield from _timed(plan, "packed attention", sizes, calls, work, mode="fwd+bwd")


def _timed(
    plan: Plan,
    name: str,
    sizes: dict[str, int],
    calls: dict[str, Call],
    work: Work,
    mode: str = "fwd",
) -> Iterator[Row]:
    """Rows as those of an operation, of calls that are none."""
    times = measure(plan.device, calls, plan.budget_s, plan.cold)
    limit, limit_ms = bound(work, "bfloat16", plan.limits)
    for provider, call in calls.items():
        row: dict[str, Any] = {
            "operation": name,
            "sizes": sizes,
            "dtype": "bfloat16",
            "mode": mode,
            "provider": provider,
            **spread(times[provider]),
            "limit": limit,
            "limit_ms": limit_ms,
            "cache": "cold" if plan.cold or plan.device == "cuda" else "warm",
            "peak_bytes": peak_bytes(plan.device, call),
            "host_us": host_us(plan.device, call),
        }
        yield row | {"share_of_limit": limit_ms / row["ms"]}


VARIANTS: tuple[Callable[[Plan], Iterator[Row]], ...] = (head, optimizer, attention)
