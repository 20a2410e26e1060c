"""TRL's fused language-model head: log-probabilities of the labels from hidden states, with no
tensor of tokens x vocabulary. `add_fused_lm_head`, and with it the trainers of GRPO, RLOO, DPO, KTO
and SFT, call it as `ChunkedLogProbFunction.apply`, which runs the two functions here.

Either may be TRL's while the other is ours, as both save for the backward pass the same tensors.
Under autocast, TRL's default, hidden states and weight are rounded to its dtype for the products,
sums and gradients are float32, and these come in the dtypes of hidden states and weight, as in TRL.
The rounded weight is a copy, which lives for the length of a call. Left to TRL: weights of ZeRO-3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._arguments.logprobs import LogprobsArguments, LogprobsBackwardArguments
from warpo.kernels._checks import FLOATS
from warpo.kernels._linear_head import LinearHead
from warpo.kernels._linear_head_plan import APART, OVER, check_chunking
from warpo.kernels._logprobs_operator import workspace
from warpo.kernels.integrations.serving import require, require_served
from warpo.kernels.integrations.trl._library import library

NONE_IGNORED = torch.iinfo(torch.int64).min
# TRL's results beside log-probabilities and entropy, in its order: no gradient flows through them
CONSTANTS = {
    "log_sum_sq_probs": torch.float32,
    "mean_logits": torch.float32,
    "is_top1": torch.bool,
}


@library.replaces(
    "trl.kernels.chunked_logprob", "ChunkedLogProbFunction.forward", "linear_logprobs_and_entropy"
)
def forward(
    original: Callable,
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> tuple[Tensor | None, ...]:
    """Differs: a target outside the vocabulary gives NaN, where TRL takes its logit for 0.

    `chunk_size` is for TRL's backward pass: ours takes 64 MiB of logits at a time, on a GPU a
    sixteenth of its memory, 4 GiB at most.
    """
    dtype = _product_dtype(hidden)
    _check(hidden, weight, bias, targets, dtype)
    require(logit_scale > 0, "a logit_scale of 0 or less")
    capped = final_logit_softcapping is not None
    cap = (final_logit_softcapping or 0.0) / logit_scale
    head = LinearHead(
        *_rounded(dtype, hidden, weight, bias),
        cap,
        torch.ones_like(targets, dtype=torch.bool),
        *_chunking(hidden, cap),
    )
    logprobs, entropy, stats, constants = _score(head, targets, temperature / logit_scale, outputs)
    log_z = (stats[:, 0].double() * logit_scale / temperature + stats[:, 1]).float()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, bias, targets, log_z, log_z if entropy is None else entropy
    )
    ctx.compute_dtype, ctx.chunk_size, ctx.stats = dtype, chunk_size, stats
    ctx.kernel_args = {
        "logit_scale": logit_scale,
        "softcap": final_logit_softcapping if capped else 1.0,
        "inv_t": 1 / temperature,
        "HAS_SOFTCAP": capped,
    }
    ctx.mark_non_differentiable(*constants.values())
    return logprobs, entropy, *map(constants.get, CONSTANTS)


@library.replaces(
    "trl.kernels.chunked_logprob", "ChunkedLogProbFunction.backward", "linear_logprobs_and_entropy"
)
def backward(
    original: Callable,
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    """Differs: on a CPU, tokens whose gradients are 0, as prompts have, take no part."""
    hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
    dtype = ctx.compute_dtype
    _check(hidden, weight, bias, targets, dtype)
    given = [g for g in (grad_logprobs, grad_entropy) if g is not None]
    if not given:
        return (None,) * 9
    # our own say more of logsumexp than its float32 sum does
    stats = getattr(ctx, "stats", None)
    if stats is None:
        stats = torch.stack([torch.zeros_like(log_z), log_z], -1)
    valid = torch.ones_like(targets, dtype=torch.bool)
    if hidden.device.type == "cpu":
        valid = torch.stack(given).any(0)
        stats = stats[valid]
    scale = ctx.kernel_args["logit_scale"]
    cap = ctx.kernel_args["softcap"] / scale if ctx.kernel_args["HAS_SOFTCAP"] else 0.0
    head = LinearHead(
        *_rounded(dtype, hidden, weight, bias),
        cap,
        valid,
        *_chunking(hidden, cap),
        gradients=APART if cap else OVER,
        float32_gradients={hidden.dtype, weight.dtype} != {dtype},
    )
    wanted = list(ctx.needs_input_grad[:3])
    head.start_gradients(wanted)
    _differentiate(
        head,
        targets,
        1 / (ctx.kernel_args["inv_t"] * scale),
        None if grad_entropy is None else entropy,
        stats,
        grad_logprobs,
        grad_entropy,
    )
    likes = zip(head.gradients(), (hidden, weight, bias), strict=True)
    gradients = (None if g is None else g.view(x.shape).to(x.dtype) for g, x in likes)
    return (*gradients, *(None,) * 6)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> None:
    require_served(hidden, weight, bias)
    require(dtype in FLOATS, "an autocast to a dtype without a kernel")
    require(targets.dtype == torch.int64, "targets that are not int64")
    require(targets.device == hidden.device, "tensors on two devices")
    require(weight.numel() > 0 and not hasattr(weight, "ds_id"), "a weight of ZeRO-3")
    require(dispatch.choose(hidden, None) != "reference", "the backend reference")


def _rounded(
    dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors of the products: hidden as (1, tokens, H), weight and bias."""
    return (
        hidden.to(dtype).contiguous()[None],
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _differentiate(
    head: LinearHead,
    targets: Tensor,
    temperature: float,
    entropy: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Add the gradients of all chunks up in the head."""
    kernels = dispatch.load(dispatch.choose(targets, None))
    tokens = [head.compact(x) for x in (targets, entropy, grad_logprobs, grad_entropy)]
    buffer = head.new_buffer()
    for start, stop in head.chunks():
        logits = head.logits(start, stop, buffer)
        grad_logits = head.grad_logits(start, stop, logits)
        part: list[Any] = [None if x is None else x[:, start:stop] for x in tokens]
        chosen, own, grad_logp, grad_own = part
        forward = _arguments(logits[None], chosen, temperature)
        arguments = LogprobsBackwardArguments(
            forward=forward._replace(entropy=own, stats=stats[None, start:stop]),
            grad_logprobs=grad_logp,
            grad_entropy=grad_own,
            grad_logits=grad_logits[None],
        )
        kernels.logprobs_backward(arguments)
        head.add_gradients(start, stop, logits, grad_logits)


def _chunking(hidden: Tensor, cap: float) -> tuple[int, int, bool]:
    # TRL rounds the logits to the dtype of the product, but not what the cap makes of them
    return check_chunking(hidden, None, None, "float32" if cap else "input")


def _score(
    head: LinearHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]
) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
    """logprobs, entropy and stats (max z, log d) of every token, and the CONSTANTS wanted.

    With T the temperature and d(T) the sum of e^((z - max z) / T): log sum p^2 = log d(T / 2) - 2
    log d(T).
    """
    tokens = targets.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=targets.device)

    logp, stats, sharp = new(1, tokens), new(1, tokens, 2), new(1, tokens, 2)
    entropy = new(1, tokens) if "entropy" in outputs else None
    constants = {
        name: new(tokens, dtype=dtype) for name, dtype in CONSTANTS.items() if name in outputs
    }
    buffer = head.new_buffer()
    for start, stop in head.chunks():
        part = slice(start, stop)
        logits, chosen = head.logits(start, stop, buffer)[None], targets[None, part]
        _softmax(logits, chosen, temperature, logp[:, part], entropy, part, stats[:, part])
        if "log_sum_sq_probs" in constants:
            scratch = torch.empty_like(logp[:, part])
            _softmax(logits, chosen, temperature / 2, scratch, None, part, sharp[:, part])
            two, one = sharp[0, part, 1], stats[0, part, 1]
            constants["log_sum_sq_probs"][part] = two - 2 * one
        if "mean_logits" in constants:
            constants["mean_logits"][part] = logits[0].float().mean(-1) / temperature
        if "is_top1" in constants:
            # of equal logits `max` finds the first
            constants["is_top1"][part] = logits[0].max(-1).indices == targets[part]
    return logp[0], None if entropy is None else entropy[0], stats[0], constants


def _softmax(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    logp: Tensor,
    entropy: Tensor | None,
    part: slice,
    stats: Tensor,
) -> None:
    arguments = _arguments(logits, targets, temperature)._replace(
        logprobs=logp,
        entropy=None if entropy is None else entropy[:, part],
        stats=stats,
        partials=workspace(logits),
    )
    dispatch.load(dispatch.choose(logits, None)).logprobs_forward(arguments)


def _arguments(logits: Tensor, targets: Tensor, temperature: float) -> LogprobsArguments:
    rows, steps, vocab = logits.shape
    return LogprobsArguments(
        rows=rows,
        steps=steps,
        vocab=vocab,
        logits=logits,
        targets=targets,
        temperature=temperature,
        token_temperature=None,
        mask=None,
        ignore_index=NONE_IGNORED,
        logprobs=None,
        entropy=None,
        stats=None,
        partials=None,
    )
