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

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels.checks import check_tensor
from warpo.kernels.linear_head import check_head
from warpo.kernels.offsets import check_values
from warpo.kernels.positional import PositionalOperator as Operator

INTEGERS = (torch.int32, torch.int64)


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
            hidden.float(), weight.float(), targets, kept_ids, kept_offsets, temperature,
            bias=None if bias is None else bias.float(),
        )  # fmt: skip
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = temperature, 1.0
    arguments = (hidden, weight, bias, targets, kept_ids, kept_offsets)
    return _operator(*arguments, temperature, token_temperature, name)[0]


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


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_values("kept_offsets", kept_offsets, kept_ids.shape[0], "kept ids")
    logp, kept_logits, stats = _allocate(hidden, kept_ids)
    dispatch.load_positional(backend).kept_set_logprobs_forward(
        hidden.shape[0], *weight.shape, kept_ids.shape[0], hidden, weight, bias, targets, kept_ids,
        kept_offsets, temperature, token_temperature, logp, kept_logits, stats,
    )  # fmt: skip
    return logp, kept_logits, stats


def _allocate(hidden: Tensor, kept_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    return (
        hidden.new_empty((tokens,), dtype=torch.float32),
        # zeros: entries that no token has
        hidden.new_zeros((kept_ids.shape[0],), dtype=torch.float32),
        hidden.new_empty((tokens, 2), dtype=torch.float32),
    )


def _fake_forward(hidden, weight, bias, targets, kept_ids, *_):
    return _allocate(hidden, kept_ids)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    kept_logits: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty ones for those that are not wanted."""
    check_values("kept_offsets", kept_offsets, kept_ids.shape[0], "kept ids")
    grad_hidden, grad_weight, grad_bias = _allocate_gradients(hidden, weight, bias, wanted)
    kernels, grad_logits = dispatch.load_positional(backend), torch.zeros_like(kept_logits)
    kernels.kept_set_logprobs_backward(
        hidden.shape[0], *weight.shape, kept_ids.shape[0], hidden, weight, bias, targets, kept_ids,
        kept_offsets, temperature, token_temperature, None, kept_logits, stats, grad_logprobs,
        grad_hidden if wanted[0] else None, grad_logits,
    )  # fmt: skip
    if wanted[1] or wanted[2]:
        ids, order = kept_ids.sort(stable=True)
        bounds = torch.arange(weight.shape[0] + 1, device=ids.device, dtype=ids.dtype)
        tokens = torch.searchsorted(kept_offsets.long(), order, right=True) - 1
        tokens = tokens.clamp_(0, hidden.shape[0] - 1)  # of entries that no token has
        sums = torch.empty_like(grad_bias, dtype=torch.float32)
        kernels.kept_set_weight_gradient(
            *weight.shape, hidden, order, tokens, torch.searchsorted(ids, bounds), grad_logits,
            grad_weight if wanted[1] else None, sums if wanted[2] else None,
        )  # fmt: skip
        if wanted[2]:
            grad_bias.copy_(sums)
    return grad_hidden, grad_weight, grad_bias


def _allocate_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return hidden.new_empty((0,))
        return tensor.new_empty(tensor.shape)

    return like(hidden, wanted[0]), like(weight, wanted[1]), like(bias, wanted[2])


def _fake_backward(hidden, weight, bias, *arguments):
    return _allocate_gradients(hidden, weight, bias, arguments[-2])


_backward_operator = Operator("kept_set_logprobs_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, kept_ids, kept_offsets = inputs[:6]
    ctx.temperature, token_temperature, ctx.backend = inputs[6:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, bias, targets, kept_ids, kept_offsets, token_temperature, *output[1:]
    )


def _differentiate(ctx, grad_logprobs, _grad_kept_logits, _grad_stats):
    if grad_logprobs is None:
        return (None,) * 9
    *inputs, token_temperature, kept_logits, stats = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward_operator(
        *inputs, ctx.temperature, token_temperature, kept_logits, stats, grad_logprobs, wanted,
        ctx.backend,
    )  # fmt: skip
    return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 6)


_operator = Operator("kept_set_logprobs", _forward, _fake_forward, _save, _differentiate)
