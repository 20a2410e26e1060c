"""Log-probability and entropy of the taken tokens from hidden states and the linear head, with no
tensor of tokens x vocabulary.

    logits  = hidden @ weight.T + bias, with a soft cap c: c tanh(logits / c)
    logp    = (logits / T)_y - logsumexp(logits / T)
    entropy = -sum_j p_j log p_j,   p = softmax(logits / T)

Backward, with G = d loss / d logits as `logprobs` gives it, times 1 - (logits / c)^2 under a cap:

    d hidden = G weight,   d weight = G.T hidden,   d bias = sum over tokens of G

Tokens go through in chunks. Where the logits of all tokens fit in workspace_bytes they are kept for
the backward pass, which writes their gradients over them: three matrix products. Otherwise the
backward pass computes the logits of a chunk anew: four.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from warpo.kernels import dispatch, reference
from warpo.kernels.linear_head import LinearHead, check_chunking, check_head, valid_tokens
from warpo.kernels.logprobs import LogprobsAndEntropy, workspace
from warpo.kernels.positional import PositionalOperator as Operator
from warpo.kernels.registration import keeps_graph
from warpo.kernels.vocab_parallel import check_group, resolve_group, split_backward, split_forward


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_valid: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: str = "float32",
    cache_logits: bool | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each taken token under softmax(cap(hidden @ weight.T + bias) / T).

    Args:
        hidden: (..., H) float32 | bfloat16 | float16, last stride 1; the leading dimensions may be
            any view that two strides describe, so `hidden[:, :-1]` is not copied. Differentiable.
        weight: (V, H) in the dtype of hidden, last stride 1. Differentiable; its gradient is dense,
            summed in float32 over all tokens and rounded once. On a GPU, and in bfloat16 on a CPU
            with AVX512_BF16, the gradients of the logits are rounded to that dtype before.
        targets: (...) int64 | int32 in [0, V). A target outside poisons its token with NaN.
        bias: (V,) float32 | bfloat16 | float16. Differentiable.
        temperature: finite and > 0: a number, a () float32 on the device, or one float32 per token.
            Not differentiable. What is on the device is not looked at: a token whose temperature is
            not finite and > 0 gets NaN, result and gradient.
        mask: (...) bool | uint8. Where 0, the hidden state counts for nothing (it may hold NaN):
            result and gradient are 0, and the token takes no part in the matrix products.
        ignore_index: a target of this value counts as masked.
        softcap: c > 0 of c tanh(logits / c), before the temperature.
        num_valid: CUDA only: an upper bound, known to the host, of the number of tokens that count.
            Without it masked tokens are multiplied too, since to count them would stop the host. A
            bound too low leaves NaN at the tokens that it cut off. The CPU counts for itself.
        workspace_bytes: room for the chunks, 64 MiB on a CPU and 1 GiB on a GPU by default. At
            least one token is taken at a time.
        logits_dtype: "float32", or "input": the logits of a chunk rounded to the dtype of hidden,
            half the room, and what a head of that dtype would give.
        cache_logits: keep the logits for backward: tokens x V elements, masked ones included, for
            one matrix product less. None: where they fit in workspace_bytes.
        process_group: the vocabulary is split over its ranks in equal parts: weight and bias are
            those of this rank, hidden and targets are the same on all. Each rank gets the same
            results and the whole gradient of hidden, with a collective a chunk forward and one
            backward: hidden must not be summed over the ranks again. Eager mode only.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (...) float32, natural log, <= 0.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.

    Source: online softmax, https://arxiv.org/abs/1805.02867. Memory beyond arguments and results:
    workspace_bytes and 16 bytes a token; backward, 4 V H bytes for the gradient of a weight that is
    not float32, and workspace_bytes beside kept logits that are not overwritten, as with a softcap
    and in a graph that is kept.
    """
    return _run(
        hidden, weight, targets, bias, temperature, mask, ignore_index, softcap, num_valid,
        workspace_bytes, logits_dtype, False, cache_logits, process_group, backend,
    )[0]  # fmt: skip


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_valid: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: str = "float32",
    cache_logits: bool | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> LogprobsAndEntropy:
    """`linear_logprobs` and, from the same pass, the entropy of the distribution, in nats.

    Arguments and errors are those of `linear_logprobs`. Both results are differentiable.
    """
    return LogprobsAndEntropy(
        *_run(
            hidden, weight, targets, bias, temperature, mask, ignore_index, softcap, num_valid,
            workspace_bytes, logits_dtype, True, cache_logits, process_group, backend,
        )
    )  # fmt: skip


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    num_valid: int | None,
    workspace_bytes: int | None,
    logits_dtype: str,
    with_entropy: bool,
    cache_logits: bool | None,
    group: ProcessGroup | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    rows, targets, temperature = check_head(
        hidden, weight, bias, targets, temperature, mask, softcap
    )
    chunking = check_chunking(hidden, num_valid, workspace_bytes, logits_dtype)
    name = dispatch.choose(hidden, backend)
    if name == "reference":
        if group is not None:
            raise ValueError("process_group is not supported by backend 'reference'")
        return reference.linear_logprobs(
            hidden.float(), weight.float(), targets, temperature, mask, ignore_index,
            bias=None if bias is None else bias.float(), softcap=softcap,
        )  # fmt: skip
    if group is not None:
        check_group(group)
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = temperature.reshape(-1), 1.0
    arguments = (
        rows, weight, bias, targets.reshape(-1), temperature, token_temperature,
        None if mask is None else mask.reshape(-1), ignore_index, softcap or 0.0, *chunking,
        with_entropy, _keeps_logits(cache_logits, rows, weight, bias, *chunking[1:]), name,
        "" if group is None else group.group_name,
    )  # fmt: skip
    logp, entropy = _operator(*arguments)
    shape = targets.shape
    return logp.view(shape), entropy.view(shape) if with_entropy else entropy


def _keeps_logits(
    asked: bool | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workspace_bytes: int,
    float32_logits: bool,
) -> bool:
    differentiable = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if not (differentiable and torch.is_grad_enabled()):
        return False
    if asked is not None:
        return asked
    rows, steps, _ = hidden.shape
    itemsize = 4 if float32_logits else hidden.dtype.itemsize
    return rows * steps * weight.shape[0] * itemsize <= workspace_bytes


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    softcap: float,
    num_valid: int,
    workspace_bytes: int,
    float32_logits: bool,
    with_entropy: bool,
    cache_logits: bool,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs and entropy of every token; of the compacted ones the stats and, kept, logits."""
    valid = valid_tokens(targets, mask, ignore_index)
    head = LinearHead(
        hidden, weight, bias, softcap, valid, num_valid, workspace_bytes, float32_logits,
        kept=cache_logits,
    )  # fmt: skip
    logp, entropy, stats, cache = _allocate(
        hidden, weight, targets, float32_logits, with_entropy, cache_logits
    )
    if head.count == 0:
        return torch.zeros_like(logp), torch.zeros_like(entropy), stats, cache
    kernels, group = dispatch.load_positional(backend), resolve_group(group_name)
    tokens = [head.compact(x) for x in (targets, token_temperature, mask)]
    buffer = cache if cache_logits else head.new_buffer()
    for start, stop in head.chunks():
        out = buffer[start:stop] if cache_logits else buffer
        logits = head.logits(start, stop, out)[None]
        part: list[Any] = [None if x is None else x[:, start:stop] for x in tokens]
        chosen, warm, flags = part
        options = (temperature, warm, flags, ignore_index)
        results = (logp[None, start:stop], entropy[None, start:stop], stats[None, start:stop])
        if group is not None:
            whole = split_forward(logits, chosen, options, kernels, group)
            for result, computed in zip(results, whole, strict=True):
                if result.numel():
                    result.copy_(computed)
            continue
        kernels.logprobs_forward(
            *logits.shape, logits, chosen, *options, results[0],
            results[1] if with_entropy else None, results[2],
            workspace(logits),
        )  # fmt: skip
    if with_entropy:
        entropy = head.spread(entropy[: head.count])
    return head.spread(logp[: head.count]), entropy, stats, cache


def _allocate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    float32_logits: bool,
    with_entropy: bool,
    cache_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = targets.shape[0]
    dtype = torch.float32 if float32_logits else hidden.dtype
    return (
        hidden.new_empty((tokens,), dtype=torch.float32),
        hidden.new_empty((tokens if with_entropy else 0,), dtype=torch.float32),
        hidden.new_zeros(
            (tokens, 2), dtype=torch.float32
        ),  # fewer are written where some are masked
        hidden.new_empty((tokens if cache_logits else 0, weight.shape[0]), dtype=dtype),
    )


def _fake_forward(hidden, weight, bias, targets, *arguments):
    return _allocate(hidden, weight, targets, *arguments[7:10])


def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    softcap: float,
    num_valid: int,
    workspace_bytes: int,
    float32_logits: bool,
    backend: str,
    group_name: str,
    entropy: Tensor | None,
    stats: Tensor,
    cache: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    wanted: list[bool],
    overwrites: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty ones for those that are not wanted. stats are
    those of the compacted tokens. overwrites: the cache is not needed again. Not for
    `torch.library`, whose schema says that nothing is written to.
    """
    valid = valid_tokens(targets, mask, ignore_index)
    apart = bool(softcap) and cache is None
    overwrites = overwrites and cache is not None and not softcap
    head = LinearHead(
        hidden, weight, bias, softcap, valid, num_valid, workspace_bytes, float32_logits, apart,
        kept=cache is not None,
    )  # fmt: skip
    kernels, group = dispatch.load_positional(backend), resolve_group(group_name)
    head.start_gradients(wanted, group)
    tokens = [
        head.compact(x)
        for x in (targets, token_temperature, mask, entropy, grad_logprobs, grad_entropy)
    ]
    buffer: Any = None if overwrites else head.new_buffer()
    grad_buffer = head.new_buffer() if apart else buffer
    for start, stop in head.chunks():
        logits = head.logits(start, stop, buffer) if cache is None else cache[start:stop]
        grad_logits = logits if overwrites else grad_buffer[: stop - start]
        part: list[Any] = [None if x is None else x[:, start:stop] for x in tokens]
        chosen, warm, flags, own_entropy, grad_logp, grad_own_entropy = part
        options = (temperature, warm, flags, ignore_index)
        own, grads = (own_entropy, stats[None, start:stop]), (grad_logp, grad_own_entropy)
        if group is None:
            kernels.logprobs_backward(
                1, *logits.shape, logits[None], chosen, *options, None, *own, None, *grads,
                grad_logits[None],
            )  # fmt: skip
        else:
            split_backward(
                logits[None], chosen, options, *own, *grads, grad_logits[None], kernels, group
            )
        head.add_gradients(start, stop, logits, grad_logits)
    of_hidden, of_weight, of_bias = (
        hidden.new_empty((0,)) if gradient is None else gradient for gradient in head.gradients()
    )
    return of_hidden, of_weight, of_bias


def _fake_backward(hidden, weight, bias, *arguments):
    wanted = arguments[-2]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


_backward_operator = Operator("linear_logprobs_backward", linear_logprobs_backward, _fake_backward)


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, temperature, token_temperature, mask, ignore_index = inputs[:8]
    *chunking, with_entropy, cache_logits, backend, group_name = inputs[8:]
    ctx.options = (*chunking, backend, group_name)
    _, entropy, stats, cache = output
    ctx.temperature, ctx.ignore_index = temperature, ignore_index
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, bias, targets, token_temperature, mask,
        entropy if with_entropy else None, stats, cache if cache_logits else None,
    )  # fmt: skip


def _differentiate(ctx, grad_logprobs, grad_entropy, *_, overwrites=False):
    hidden, weight, bias, targets, warm, mask, entropy, stats, cache = ctx.saved_tensors
    if entropy is None:
        grad_entropy = None  # of the empty tensor that stands for it
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 16
    wanted = list(ctx.needs_input_grad[:3])
    gradients = (linear_logprobs_backward if overwrites else _backward_operator)(
        hidden, weight, bias, targets, ctx.temperature, warm, mask, ctx.ignore_index,
        *ctx.options, entropy, stats, cache, grad_logprobs, grad_entropy, wanted, overwrites,
    )  # fmt: skip
    return (
        *(g if want else None for g, want in zip(gradients, wanted, strict=True)),
        *(None,) * 13,
    )


def _differentiate_eager(ctx, *gradients):
    """On the last walk through the graph kept logits make room for their gradients."""
    kept = torch.compiler.is_compiling() or keeps_graph()
    return _differentiate(ctx, *gradients, overwrites=not kept)


_operator = Operator(
    "linear_logprobs", _forward, _fake_forward, _save, _differentiate,
    differentiate_eager=_differentiate_eager, returned=2,
)  # fmt: skip
