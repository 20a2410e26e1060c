"""The operator behind `linear_logprobs`: chunks of the head, and logprobs of the logits of each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._arguments.logprobs import LogprobsArguments, LogprobsBackwardArguments
from warpo.kernels._linear_head import LinearHead, is_on_cpu, valid_tokens
from warpo.kernels._linear_head_plan import APART, NONE, OVER, row_stride
from warpo.kernels._logprobs_operator import workspace
from warpo.kernels._registration import Operator, keeps_graph
from warpo.kernels._vocab_parallel import resolve_group, split_backward, split_forward


class LinearLogprobsInputs(NamedTuple):
    """The tensors, then the rest."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    token_temperature: Tensor | None
    mask: Tensor | None
    temperature: float
    ignore_index: int
    softcap: float
    num_valid: int
    workspace_bytes: int
    float32_logits: bool
    with_entropy: bool
    cache_logits: bool
    backend: str
    group_name: str


NUM_TENSORS = 6


class LinearLogprobsBackwardInputs(NamedTuple):
    """stats are those of the compacted tokens. overwrites: the cache is not needed again."""

    stats: Tensor
    forward: LinearLogprobsInputs
    entropy: Tensor | None
    cache: Tensor | None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    wanted: list[bool]
    overwrites: bool


class _Tokens(NamedTuple):
    """What is one per token, (1, count) of the compacted tokens or of a chunk of them."""

    targets: Tensor
    token_temperature: Tensor | None
    mask: Tensor | None
    entropy: Tensor | None = None
    grad_logprobs: Tensor | None = None
    grad_entropy: Tensor | None = None

    def part(self, start: int, stop: int) -> "_Tokens":
        if stop - start == self.targets.shape[1]:
            return self
        return _Tokens._make([None if x is None else x[:, start:stop] for x in self])


def _head(inputs: LinearLogprobsInputs, *, kept: bool, gradients: str = NONE) -> LinearHead:
    return LinearHead(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.softcap,
        valid_tokens(inputs.targets, inputs.mask, inputs.ignore_index),
        inputs.num_valid,
        inputs.workspace_bytes,
        inputs.float32_logits,
        gradients=gradients,
        kept=kept,
    )


def _arguments(
    inputs: LinearLogprobsInputs,
    tokens: _Tokens,
    logits: Tensor,
    *,
    logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    stats: Tensor | None = None,
    partials: Tensor | None = None,
) -> LogprobsArguments:
    rows, steps, vocab = logits.shape
    return LogprobsArguments(
        rows=rows,
        steps=steps,
        vocab=vocab,
        logits=logits,
        targets=tokens.targets,
        temperature=inputs.temperature,
        token_temperature=tokens.token_temperature,
        mask=tokens.mask,
        ignore_index=inputs.ignore_index,
        logprobs=logprobs,
        entropy=entropy,
        stats=stats,
        partials=partials,
    )


def _forward(inputs: LinearLogprobsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs and entropy of every token; of the compacted ones the stats and, kept, logits."""
    head = _head(inputs, kept=inputs.cache_logits)
    logp, entropy, stats, cache = _allocate(inputs)
    if head.count == 0:
        return torch.zeros_like(logp), torch.zeros_like(entropy), stats, cache
    kernels, group = dispatch.load(inputs.backend), resolve_group(inputs.group_name)
    every = _Tokens(
        targets=head.compact(inputs.targets),
        token_temperature=head.compact(inputs.token_temperature),
        mask=head.compact(inputs.mask),
    )
    buffer = cache if inputs.cache_logits else head.new_buffer()
    for start, stop in head.chunks():
        out = buffer[start:stop, : head.vocab] if inputs.cache_logits else buffer
        logits = head.logits(start, stop, out)[None]
        tokens = every.part(start, stop)
        results = (logp[None, start:stop], entropy[None, start:stop], stats[None, start:stop])
        if group is not None:
            whole = split_forward(_arguments(inputs, tokens, logits), kernels, group)
            for result, computed in zip(results, whole, strict=True):
                if result.numel():
                    result.copy_(computed)
            continue
        arguments = _arguments(
            inputs,
            tokens,
            logits,
            logprobs=results[0],
            entropy=results[1] if inputs.with_entropy else None,
            stats=results[2],
            partials=workspace(logits),
        )
        kernels.logprobs_forward(arguments)
    if inputs.with_entropy:
        entropy = head.spread(entropy[: head.count])
    return head.spread(logp[: head.count]), entropy, stats, cache


def _allocate(inputs: LinearLogprobsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, tokens = inputs.hidden, inputs.targets.shape[0]
    stride = row_stride(inputs.weight.shape[0], is_on_cpu(hidden))
    dtype = torch.float32 if inputs.float32_logits else hidden.dtype
    return (
        hidden.new_empty((tokens,), dtype=torch.float32),
        hidden.new_empty((tokens if inputs.with_entropy else 0,), dtype=torch.float32),
        # fewer are written where some are masked
        hidden.new_zeros((tokens, 2), dtype=torch.float32),
        hidden.new_empty((tokens if inputs.cache_logits else 0, stride), dtype=dtype),
    )


def _backward(inputs: LinearLogprobsBackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty ones for those that are not wanted. With
    overwrites not for `torch.library`, whose schema says that nothing is written to.
    """
    given, cache = inputs.forward, inputs.cache
    over = not given.softcap and (cache is None or inputs.overwrites)
    head = _head(given, kept=cache is not None, gradients=OVER if over else APART)
    kernels, group = dispatch.load(given.backend), resolve_group(given.group_name)
    head.start_gradients(inputs.wanted, group)
    every = _Tokens(
        targets=head.compact(given.targets),
        token_temperature=head.compact(given.token_temperature),
        mask=head.compact(given.mask),
        entropy=head.compact(inputs.entropy),
        grad_logprobs=head.compact(inputs.grad_logprobs),
        grad_entropy=head.compact(inputs.grad_entropy),
    )
    buffer: Any = head.new_buffer() if cache is None else None
    for start, stop in head.chunks():
        kept = None if cache is None else cache[start:stop, : head.vocab]
        logits = head.logits(start, stop, buffer) if kept is None else kept
        grad_logits = head.grad_logits(start, stop, logits)
        tokens, stats = every.part(start, stop), inputs.stats[None, start:stop]
        arguments = LogprobsBackwardArguments(
            forward=_arguments(given, tokens, logits[None], entropy=tokens.entropy, stats=stats),
            grad_logprobs=tokens.grad_logprobs,
            grad_entropy=tokens.grad_entropy,
            grad_logits=grad_logits[None],
        )
        if group is None:
            kernels.logprobs_backward(arguments)
        else:
            split_backward(arguments, kernels, group)
        head.add_gradients(start, stop, logits, grad_logits)
    of_hidden, of_weight, of_bias = (
        given.hidden.new_empty((0,)) if gradient is None else gradient
        for gradient in head.gradients()
    )
    return of_hidden, of_weight, of_bias


def _fake_backward(inputs: LinearLogprobsBackwardInputs) -> tuple[Tensor, ...]:
    given = inputs.forward
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if want and x is not None
        else given.hidden.new_empty(0)
        for x, want in zip((given.hidden, given.weight, given.bias), inputs.wanted, strict=True)
    )


_backward_operator = Operator("linear_logprobs_backward", _backward, _fake_backward)


def _save(ctx: Any, inputs: LinearLogprobsInputs, output: tuple[Tensor, ...]) -> None:
    _, entropy, stats, cache = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *inputs[:NUM_TENSORS],
        entropy if inputs.with_entropy else None,
        stats,
        cache if inputs.cache_logits else None,
    )
    ctx.rest = inputs[NUM_TENSORS:]


def _differentiate(
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *_: object,
    overwrites: bool = False,
) -> tuple[Tensor | None, ...]:
    *tensors, entropy, stats, cache = ctx.saved_tensors
    if entropy is None:
        grad_entropy = None  # of the empty tensor that stands for it
    if grad_logprobs is None and grad_entropy is None:
        return (None, None, None)
    wanted = list(ctx.needs_input_grad[:3])
    inputs = LinearLogprobsBackwardInputs(
        stats=stats,
        forward=LinearLogprobsInputs(*tensors, *ctx.rest),
        entropy=entropy,
        cache=cache,
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        wanted=wanted,
        overwrites=overwrites,
    )
    gradients = _backward(inputs) if overwrites else _backward_operator(inputs)
    return tuple([g if want else None for g, want in zip(gradients, wanted, strict=True)])


def _differentiate_eager(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """On the last walk through the graph kept logits make room for their gradients."""
    kept = torch.compiler.is_compiling() or keeps_graph()
    return _differentiate(ctx, *gradients, overwrites=not kept)


linear_logprobs_operator = Operator(
    "linear_logprobs",
    _forward,
    _allocate,
    _save,
    _differentiate,
    differentiable=3,
    differentiate_eager=_differentiate_eager,
    returned=2,
)
