"""Log-probability of each taken token among the ids that its sampler kept (top-k, top-p).

With K_n the kept ids of token n and x_j = hidden_n . weight_j + bias_j for j in K_n alone:

    logp_n = x_y / T - log sum_(j in K_n) e^(x_j / T)

Backward, with p_j = e^(x_j / T - logsumexp) and upstream g:

    d x_j = (g / T) (1[j = y] - p_j)
    d hidden_n = sum_(j in K_n) d x_j weight_j
    d weight_j = sum over the tokens n that keep j of d x_j hidden_n,   d bias_j = sum of d x_j

The distribution that top-k (https://arxiv.org/abs/1805.04833) and nucleus sampling
(https://arxiv.org/abs/1904.09751 eq. 3) draw from is the one renormalised over the kept set; a
policy that is trained on its samples has to be scored in it. The work is that of the kept ids: rows
of the weight are gathered, the rest of the vocabulary is not read. The sum for the weight runs over
the entries sorted by id, in float32 and in a fixed order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.kept_set_logprobs import (
    KeptSetLogprobsArguments,
    KeptSetLogprobsBackwardArguments,
    KeptSetWeightGradientArguments,
)
from warpo.kernels._checks import check_tensor
from warpo.kernels._linear_head import check_head
from warpo.kernels._offsets import check_values
from warpo.kernels._registration import Operator

INTEGERS = (torch.int32, torch.int64)


class KeptSetLogprobsInputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    kept_ids: Tensor
    kept_offsets: Tensor
    temperature: float
    token_temperature: Tensor | None
    backend: str


class KeptSetLogprobsBackwardInputs(NamedTuple):
    stats: Tensor
    forward: KeptSetLogprobsInputs
    kept_logits: Tensor
    grad_logprobs: Tensor
    wanted: list[bool]


def kept_set_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each taken token under the softmax over its kept ids.

    Args:
        hidden: (N, H) float32 | bfloat16 | float16, last stride 1. Differentiable.
        weight: (V, H) in the dtype of hidden, last stride 1. Differentiable; its gradient is dense,
            summed in float32.
        targets: (N,) int64 | int32, each among the kept ids of its token; a target that is not
            poisons its token with NaN, as does a kept id outside [0, V).
        kept_ids: (nnz,) int32 | int64, dense: those of token 0, then those of token 1, ... in any
            order, none twice in a token.
        kept_offsets: (N + 1,) int32 | int64, dense, not descending, within [0, nnz]: token n keeps
            kept_ids[kept_offsets[n] : kept_offsets[n + 1]]. A token that keeps none is masked: its
            hidden state is not read (it may hold NaN), its result and gradient are 0. On a GPU
            the result of a token whose offsets are malformed is NaN.
        bias: (V,) float32 | bfloat16 | float16. Differentiable.
        temperature: finite and > 0: a number, a () float32 on the device, or one float32 per token.
            Not differentiable. What is on the device is not looked at: a token whose temperature is
            not finite and > 0 gets NaN, result and gradient.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (N,) float32, natural log, <= 0.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.

    Source: see the module. Memory beyond arguments and results: 4 bytes a kept id and 8 a token;
    backward, 4 bytes a kept id, and for the gradients of weight and bias 40 bytes a kept id and 8
    an id of the vocabulary.
    """
    _, targets, temperature = check_head(hidden, weight, bias, targets, temperature, None, None)
    _check_kept(hidden, kept_ids, kept_offsets)
    name = dispatch.choose(hidden, backend)
    if name == "reference":
        check_values("kept_offsets", kept_offsets, kept_ids.shape[0], "kept ids")
        return reference.kept_set_logprobs(
            hidden.float(),
            weight.float(),
            targets,
            kept_ids,
            kept_offsets,
            temperature,
            bias=None if bias is None else bias.float(),
        )
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = temperature, 1.0
    inputs = KeptSetLogprobsInputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        kept_ids=kept_ids,
        kept_offsets=kept_offsets,
        temperature=temperature,
        token_temperature=token_temperature,
        backend=name,
    )
    return _operator(inputs)[0]


def _check_kept(hidden: Tensor, kept_ids: Tensor, kept_offsets: Tensor) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, H), got {tuple(hidden.shape)}")
    check_tensor("kept_ids", kept_ids, INTEGERS, like=hidden)
    check_tensor("kept_offsets", kept_offsets, INTEGERS, (hidden.shape[0] + 1,), hidden)
    if kept_ids.dim() != 1:
        raise ValueError(f"kept_ids must be (nnz,), got {tuple(kept_ids.shape)}")
    for name, tensor in (("kept_ids", kept_ids), ("kept_offsets", kept_offsets)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be dense, got strides {tensor.stride()}: pass {name}.contiguous()"
            )


def _forward(inputs: KeptSetLogprobsInputs) -> tuple[Tensor, Tensor, Tensor]:
    check_values("kept_offsets", inputs.kept_offsets, inputs.kept_ids.shape[0], "kept ids")
    logp, kept_logits, stats = _allocate(inputs)
    arguments = _arguments(inputs, logp, kept_logits, stats)
    dispatch.load(inputs.backend).kept_set_logprobs_forward(arguments)
    return logp, kept_logits, stats


def _arguments(
    inputs: KeptSetLogprobsInputs, logprobs: Tensor | None, kept_logits: Tensor, stats: Tensor
) -> KeptSetLogprobsArguments:
    vocab, hidden_size = inputs.weight.shape
    return KeptSetLogprobsArguments(
        tokens=inputs.hidden.shape[0],
        vocab=vocab,
        hidden_size=hidden_size,
        num_kept=inputs.kept_ids.shape[0],
        hidden=inputs.hidden,
        weight=inputs.weight,
        bias=inputs.bias,
        targets=inputs.targets,
        kept_ids=inputs.kept_ids,
        kept_offsets=inputs.kept_offsets,
        temperature=inputs.temperature,
        token_temperature=inputs.token_temperature,
        logprobs=logprobs,
        kept_logits=kept_logits,
        stats=stats,
    )


def _allocate(inputs: KeptSetLogprobsInputs) -> tuple[Tensor, Tensor, Tensor]:
    hidden, tokens = inputs.hidden, inputs.hidden.shape[0]
    return (
        hidden.new_empty((tokens,), dtype=torch.float32),
        # zeros: entries that no token has
        hidden.new_zeros((inputs.kept_ids.shape[0],), dtype=torch.float32),
        hidden.new_empty((tokens, 2), dtype=torch.float32),
    )


def _backward(inputs: KeptSetLogprobsBackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty ones for those that are not wanted."""
    given, wanted = inputs.forward, inputs.wanted
    check_values("kept_offsets", given.kept_offsets, given.kept_ids.shape[0], "kept ids")
    grad_hidden, grad_weight, grad_bias = _allocate_gradients(inputs)
    kernels, grad_logits = dispatch.load(given.backend), torch.zeros_like(inputs.kept_logits)
    arguments = KeptSetLogprobsBackwardArguments(
        forward=_arguments(given, None, inputs.kept_logits, inputs.stats),
        grad_logprobs=inputs.grad_logprobs,
        grad_hidden=grad_hidden if wanted[0] else None,
        grad_logits=grad_logits,
    )
    kernels.kept_set_logprobs_backward(arguments)
    if wanted[1] or wanted[2]:
        sums = torch.empty_like(grad_bias, dtype=torch.float32)
        weight_arguments = _weight_arguments(
            given, grad_logits, grad_weight if wanted[1] else None, sums if wanted[2] else None
        )
        kernels.kept_set_weight_gradient(weight_arguments)
        if wanted[2]:
            grad_bias.copy_(sums)
    return grad_hidden, grad_weight, grad_bias


def _weight_arguments(
    given: KeptSetLogprobsInputs,
    grad_logits: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> KeptSetWeightGradientArguments:
    """The entries in the order of their ids, and where those of each id begin."""
    vocab, hidden_size = given.weight.shape
    ids, order = given.kept_ids.sort(stable=True)
    bounds = torch.arange(vocab + 1, device=ids.device, dtype=ids.dtype)
    tokens = torch.searchsorted(given.kept_offsets.long(), order, right=True) - 1
    return KeptSetWeightGradientArguments(
        vocab=vocab,
        hidden_size=hidden_size,
        hidden=given.hidden,
        order=order,
        tokens=tokens.clamp_(0, given.hidden.shape[0] - 1),  # of entries that no token has
        offsets=torch.searchsorted(ids, bounds),
        grad_logits=grad_logits,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
    )


def _allocate_gradients(inputs: KeptSetLogprobsBackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    given = inputs.forward

    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return given.hidden.new_empty((0,))
        return tensor.new_empty(tensor.shape)

    of_hidden, of_weight, of_bias = inputs.wanted
    return like(given.hidden, of_hidden), like(given.weight, of_weight), like(given.bias, of_bias)


_backward_operator = Operator("kept_set_logprobs_backward", _backward, _allocate_gradients)


def _save(ctx: Any, inputs: KeptSetLogprobsInputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, kept_logits, stats = output
    ctx.temperature, ctx.backend = inputs.temperature, inputs.backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.targets,
        inputs.kept_ids,
        inputs.kept_offsets,
        inputs.token_temperature,
        kept_logits,
        stats,
    )


def _differentiate(ctx: Any, grad_logprobs: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_logprobs is None:
        return (None, None, None)
    hidden, weight, bias, targets, ids, offsets, warm, kept_logits, stats = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    forward = KeptSetLogprobsInputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        kept_ids=ids,
        kept_offsets=offsets,
        temperature=ctx.temperature,
        token_temperature=warm,
        backend=ctx.backend,
    )
    inputs = KeptSetLogprobsBackwardInputs(
        stats=stats,
        forward=forward,
        kept_logits=kept_logits,
        grad_logprobs=grad_logprobs,
        wanted=wanted,
    )
    gradients = _backward_operator(inputs)
    return tuple([g if want else None for g, want in zip(gradients, wanted, strict=True)])


_operator = Operator(
    "kept_set_logprobs", _forward, _allocate, _save, _differentiate, differentiable=3
)
