"""Log-probability of each taken token, and the entropy of its distribution, from logits.

With z = logits / T, m = max_j z_j, d = sum_j e^(z_j - m), w = sum_j e^(z_j - m) (z_j - m) and
target y:

    logp    = (z_y - m) - log d                    min with 0
    entropy = log d - w / d

Backward, with p_j = e^(z_j - m) / d, upstream g for logp and h for the entropy:

    d logits_j = (g (1[j = y] - p_j) - h p_j (log p_j + entropy)) / T

One read of the logits and one exponential an element give both results: online softmax,
https://arxiv.org/abs/1805.02867 algorithm 3. Saved for backward: max_j logits_j and log d, 8 bytes
a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from warpo.kernels import dispatch, reference
from warpo.kernels.checks import (
    FLOATS,
    as_int64,
    as_rows,
    as_temperature,
    check_mask,
    check_own_memory,
    check_tensor,
    check_unspent,
)
from warpo.kernels.positional import PositionalOperator as Operator
from warpo.kernels.registration import check_first_order
from warpo.kernels.vocab_parallel import VocabParallelLogprobs, check_group

# Up to so many tokens, a vocabulary past one block is given to several: fewer rows than twice the
# multiprocessors of the largest GPUs would leave them idle. It changes no bit of the results.
SPLIT_TOKENS, SPLIT_VOCAB, CHUNKS = 256, 4096, 8

# an ignore_index that no target has, where what is ignored is masked already
NO_INDEX = -(2**63)


class LogprobsAndEntropy(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each taken token: logp = (logits / T)[y] - logsumexp(logits / T).

    Args:
        logits: (..., V) float32 | bfloat16 | float16, last stride 1; the leading dimensions may be
            any view that two strides describe, so `logits[:, :-1]` is not copied. -inf is legal.
            Differentiable.
        targets: (...) int64 | int32 in [0, V); int32 is converted, 8 bytes per token. A target
            outside poisons its row with NaN; nothing is synchronised to find out.
        temperature: finite and > 0: a number, a () float32 on the device, or one float32 per token.
            Not differentiable. What is on the device is not looked at: a token whose temperature is
            not finite and > 0 gets NaN, result and gradient.
        mask: (...) bool | uint8. Where 0, the logits are not read (they may hold NaN), the result
            is 0 and the gradient 0.
        ignore_index: a target of this value counts as masked.
        inplace_backward: write the gradient over the logits, which saves their size in memory. The
            logits are then gone: a second backward raises, and so does the backward of whatever
            else has saved them. Eager mode only.
        process_group: the vocabulary is split over its ranks in equal parts: logits are those of
            this rank, (..., V / ranks), in the order of the ranks; targets index the whole
            vocabulary. Every rank gets the same results. Four numbers a token travel. Eager mode
            only.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (...) float32, natural log, <= 0. Differentiable twice and more often (create_graph=True),
        then in plain PyTorch, with temporaries of the size of the logits.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.
        RuntimeError: forward mode or a transform of torch.func, which are not computed; a second
            derivative with inplace_backward or process_group.

    Source: https://arxiv.org/abs/1805.02867. Memory beyond the arguments: 12 bytes a token forward;
    the size of the logits backward, nothing with inplace_backward.
    """
    options = (mask, ignore_index, False, inplace_backward, process_group, backend)
    return _run(logits, targets, temperature, *options)[0]


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> LogprobsAndEntropy:
    """`logprobs` and, from the same pass, the entropy H = -sum_j p_j log p_j of softmax(logits /
    T).

    Arguments and errors are those of `logprobs`. Both results are differentiable.

    Returns:
        logprobs: (...) float32, natural log, <= 0.
        entropy: (...) float32, nats, >= 0 up to rounding. 0 where masked, NaN where the target is
            out of range.
    """
    options = (mask, ignore_index, True, inplace_backward, process_group, backend)
    return LogprobsAndEntropy(*_run(logits, targets, temperature, *options))


def _run(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool,
    process_group: ProcessGroup | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    shape, targets, temperature = check_logits(logits, targets, temperature, mask)
    name = dispatch.choose(logits, backend)
    if name == "reference":
        if inplace_backward or process_group is not None:
            raise ValueError(
                "inplace_backward and process_group are not supported by backend 'reference'"
            )
        logp, entropy = reference.logprobs(logits.float(), targets, temperature, mask, ignore_index)
        return logp, entropy
    if inplace_backward:
        check_inplace(logits)
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = as_rows("temperature", temperature), 1.0
    logits, targets = as_rows("logits", logits, keep=1), as_rows("targets", targets)
    mask = None if mask is None else as_rows("mask", mask)
    options = (temperature, token_temperature, mask, ignore_index)
    if process_group is not None:
        check_group(process_group)
        logp, entropy = VocabParallelLogprobs.apply(
            logits,
            targets,
            options,
            inplace_backward,
            dispatch.load_positional(name),
            process_group,
        )
        return logp.view(shape), entropy.view(shape)
    logp, entropy, _ = _operator(logits, targets, *options, with_entropy, inplace_backward, name)
    return logp.view(shape), entropy.view(shape) if with_entropy else entropy


def check_logits(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> tuple[torch.Size, Tensor, float | Tensor]:
    """Shape of a result, and targets and temperature as the kernels take them."""
    check_tensor("logits", logits, FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"the last stride of logits must be 1, got strides {logits.stride()}: "
            "pass logits.contiguous()"
        )
    shape = logits.shape[:-1]
    targets = as_int64("targets", targets, shape, logits)
    check_mask("mask", mask, shape, logits)
    return shape, targets, as_temperature(temperature, shape, logits)


def check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            "inplace_backward is not supported under torch.compile: leave it False there"
        )
    check_own_memory("logits", logits, "pass logits.contiguous() or inplace_backward=False")


def _forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy, stats = _allocate(logits, with_entropy)
    if logp.numel():
        dispatch.load_positional(backend).logprobs_forward(
            *logits.shape, logits, targets, temperature, token_temperature, mask, ignore_index,
            logp, entropy if with_entropy else None, stats, workspace(logits),
        )  # fmt: skip
    return logp, entropy, stats


def workspace(logits: Tensor) -> Tensor | None:
    """`partials` of the forward pass over logits `[rows, steps, V]`; absent where rows are many."""
    rows, steps, vocab = logits.shape
    if rows * steps > SPLIT_TOKENS or vocab <= SPLIT_VOCAB:
        return None
    return logits.new_empty((rows, steps, CHUNKS, 4), dtype=torch.float32)


def _allocate(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps, _ = logits.shape
    return (
        logits.new_empty((rows, steps), dtype=torch.float32),
        logits.new_empty((rows, steps) if with_entropy else (0,), dtype=torch.float32),
        logits.new_empty((rows, steps, 2), dtype=torch.float32),
    )


def _fake_forward(
    logits, targets, temperature, token_temperature, mask, ignore_index, with_entropy, *_
):
    return _allocate(logits, with_entropy)


def _backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    entropy: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if grad_logits.numel():
        dispatch.load_positional(backend).logprobs_backward(
            *logits.shape, logits, targets, temperature, token_temperature, mask, ignore_index,
            None, entropy, stats, None,
            grad_logprobs, grad_entropy, grad_logits,
        )  # fmt: skip
    return grad_logits


def _fake_backward(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_backward_operator = Operator("logprobs_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:
    logits, targets, temperature, token_temperature, mask, ignore_index = inputs[:6]
    with_entropy, ctx.inplace, ctx.backend = inputs[6:]
    _, entropy, stats = output
    ctx.temperature, ctx.ignore_index, ctx.spent = temperature, ignore_index, False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        logits, targets, token_temperature, mask, entropy if with_entropy else None, stats
    )


def _differentiate(ctx, grad_logprobs, grad_entropy, _grad_stats):
    check_unspent(ctx.spent)
    logits, targets, token_temperature, mask, entropy, stats = ctx.saved_tensors
    arguments = (logits, targets, ctx.temperature, token_temperature, mask, ctx.ignore_index)
    if entropy is None:
        grad_entropy = None  # of the empty tensor that stands for it
    if grad_logprobs is None and grad_entropy is None:
        grad_logits = None
    elif ctx.inplace:
        ctx.spent = True
        with torch.no_grad():
            grad_logits = logits.detach()
            dispatch.load_positional(ctx.backend).logprobs_backward(
                *logits.shape, *arguments, None, entropy, stats, None, grad_logprobs, grad_entropy,
                grad_logits,
            )  # fmt: skip
            torch.autograd.graph.increment_version(grad_logits)
    else:
        grad_logits = _backward_operator(
            *arguments, entropy, stats, grad_logprobs, grad_entropy, ctx.backend
        )
    return (grad_logits, *(None,) * 8)


def _differentiate_again(ctx, grad_logprobs, grad_entropy, _grad_stats):
    """The gradient through the reference, which autograd differentiates to any order."""
    if ctx.inplace:
        check_first_order("logprobs with inplace_backward=True")
    logits, targets, token_temperature, mask, entropy, _ = ctx.saved_tensors
    temperature = ctx.temperature if token_temperature is None else token_temperature
    results = reference.logprobs(logits.float(), targets, temperature, mask, ctx.ignore_index)
    gradients = (grad_logprobs, None if entropy is None else grad_entropy)
    given = [(x, g) for x, g in zip(results, gradients, strict=True) if g is not None]
    grad_logits = None
    if given:
        chosen, upstream = zip(*given, strict=True)
        (grad_logits,) = torch.autograd.grad(chosen, logits, upstream, create_graph=True)
    return (grad_logits, *(None,) * 8)


_operator = Operator(
    "logprobs", _forward, _fake_forward, _save, _differentiate,
    differentiate_again=_differentiate_again,
)  # fmt: skip
