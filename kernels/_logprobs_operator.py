"""The operator behind `logprobs` and `logprobs_and_entropy`, and its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.logprobs import LogprobsArguments, LogprobsBackwardArguments
from warpo.kernels._checks import check_unspent, is_fake
from warpo.kernels._registration import Operator, check_first_order

# Up to so many tokens, a vocabulary past one block is given to several: fewer rows than twice the
# multiprocessors of the largest GPUs would leave them idle. It changes no bit of the results.
SPLIT_TOKENS, SPLIT_VOCAB, CHUNKS = 256, 4096, 8

# an ignore_index that no target has, where what is ignored is masked already
NO_INDEX = -(2**63)


class LogprobsInputs(NamedTuple):
    logits: Tensor
    targets: Tensor
    temperature: float
    token_temperature: Tensor | None
    mask: Tensor | None
    ignore_index: int
    with_entropy: bool
    inplace_backward: bool
    backend: str


class LogprobsBackwardInputs(NamedTuple):
    logits: Tensor
    targets: Tensor
    temperature: float
    token_temperature: Tensor | None
    mask: Tensor | None
    ignore_index: int
    entropy: Tensor | None
    stats: Tensor
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    backend: str


def _forward(inputs: LogprobsInputs) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy, stats = _allocate(inputs)
    if logp.numel():
        arguments = logprobs_arguments(
            inputs,
            logprobs=logp,
            entropy=entropy if inputs.with_entropy else None,
            stats=stats,
            partials=workspace(inputs.logits),
        )
        dispatch.load(inputs.backend).logprobs_forward(arguments)
    return logp, entropy, stats


def logprobs_arguments(
    inputs: LogprobsInputs | LogprobsBackwardInputs,
    *,
    logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    stats: Tensor | None = None,
    partials: Tensor | None = None,
) -> LogprobsArguments:
    rows, steps, vocab = inputs.logits.shape
    return LogprobsArguments(
        rows=rows,
        steps=steps,
        vocab=vocab,
        logits=inputs.logits,
        targets=inputs.targets,
        temperature=inputs.temperature,
        token_temperature=inputs.token_temperature,
        mask=inputs.mask,
        ignore_index=inputs.ignore_index,
        logprobs=logprobs,
        entropy=entropy,
        stats=stats,
        partials=partials,
    )


def workspace(logits: Tensor) -> Tensor | None:
    """`partials` of the forward pass over logits `[rows, steps, V]`; absent where rows are many."""
    rows, steps, vocab = logits.shape
    if rows * steps > SPLIT_TOKENS or vocab <= SPLIT_VOCAB:
        return None
    return logits.new_empty((rows, steps, CHUNKS, 4), dtype=torch.float32)


def _allocate(inputs: LogprobsInputs) -> tuple[Tensor, Tensor, Tensor]:
    logits = inputs.logits
    rows, steps, _ = logits.shape
    return (
        logits.new_empty((rows, steps), dtype=torch.float32),
        logits.new_empty((rows, steps) if inputs.with_entropy else (0,), dtype=torch.float32),
        logits.new_empty((rows, steps, 2), dtype=torch.float32),
    )


def _backward(inputs: LogprobsBackwardInputs) -> Tensor:
    grad_logits = _allocate_gradient(inputs)
    if grad_logits.numel():
        _launch_backward(inputs, grad_logits)
    return grad_logits


def _launch_backward(inputs: LogprobsBackwardInputs, grad_logits: Tensor) -> None:
    arguments = LogprobsBackwardArguments(
        forward=logprobs_arguments(inputs, entropy=inputs.entropy, stats=inputs.stats),
        grad_logprobs=inputs.grad_logprobs,
        grad_entropy=inputs.grad_entropy,
        grad_logits=grad_logits,
    )
    dispatch.load(inputs.backend).logprobs_backward(arguments)


def _allocate_gradient(inputs: LogprobsBackwardInputs) -> Tensor:
    return torch.empty_like(inputs.logits, memory_format=torch.contiguous_format)


_backward_operator = Operator("logprobs_backward", _backward, _allocate_gradient)


def _save(ctx: Any, inputs: LogprobsInputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, entropy, stats = output
    ctx.temperature, ctx.ignore_index = inputs.temperature, inputs.ignore_index
    ctx.inplace, ctx.backend, ctx.spent = inputs.inplace_backward, inputs.backend, False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        inputs.logits,
        inputs.targets,
        inputs.token_temperature,
        inputs.mask,
        entropy if inputs.with_entropy else None,
        stats,
    )


def _differentiate(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: None
) -> tuple[Tensor | None]:
    check_unspent(ctx.spent)
    logits, targets, token_temperature, mask, entropy, stats = ctx.saved_tensors
    if entropy is None:
        grad_entropy = None  # of the empty tensor that stands for it
    if grad_logprobs is None and grad_entropy is None:
        return (None,)
    inputs = LogprobsBackwardInputs(
        logits=logits,
        targets=targets,
        temperature=ctx.temperature,
        token_temperature=token_temperature,
        mask=mask,
        ignore_index=ctx.ignore_index,
        entropy=entropy,
        stats=stats,
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        backend=ctx.backend,
    )
    if not ctx.inplace:
        return (_backward_operator(inputs),)
    ctx.spent = True
    with torch.no_grad():
        grad_logits = logits.detach()
        if not is_fake(logits):
            _launch_backward(inputs, grad_logits)
        torch.autograd.graph.increment_version(grad_logits)
    return (grad_logits,)


def _differentiate_again(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: None
) -> tuple[Tensor | None]:
    """The gradient through the reference, which autograd differentiates to any order."""
    if ctx.inplace:
        check_first_order("logprobs with inplace_backward=True")
    logits, targets, token_temperature, mask, entropy, _ = ctx.saved_tensors
    temperature = ctx.temperature if token_temperature is None else token_temperature
    results = reference.logprobs(logits.float(), targets, temperature, mask, ctx.ignore_index)
    gradients = (grad_logprobs, None if entropy is None else grad_entropy)
    given = [(x, g) for x, g in zip(results, gradients, strict=True) if g is not None]
    if not given:
        return (None,)
    chosen, upstream = zip(*given, strict=True)
    return torch.autograd.grad(chosen, logits, upstream, create_graph=True)


logprobs_operator = Operator(
    "logprobs",
    _forward,
    _allocate,
    _save,
    _differentiate,
    differentiable=1,
    differentiate_again=_differentiate_again,
)
