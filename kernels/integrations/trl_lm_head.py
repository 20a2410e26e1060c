"""TRL's fused language-model head: log-probabilities of the labels from hidden states, with no
tensor of tokens x vocabulary. `add_fused_lm_head`, and with it the trainers of GRPO, RLOO, DPO, KTO
and SFT, call it as `ChunkedLogProbFunction.apply`, which runs the two functions here.

Either may be TRL's while the other is ours, as both save for the backward pass the same tensors.
Left to TRL: weights in another dtype than the products (autocast over float32 weights), and those
of ZeRO-3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels.integrations.patching import served
from warpo.kernels.integrations.trl_library import library
from warpo.kernels.linear_head import LinearHead, check_chunking
from warpo.kernels.linear_logprobs import linear_logprobs_backward
from warpo.kernels.logprobs import workspace

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

    `chunk_size` is for TRL's backward pass: ours takes 64 MiB of logits at a time, 1 GiB on a GPU.
    """
    dtype = _product_dtype(hidden)
    if not _takes(hidden, weight, bias, targets, dtype) or not logit_scale > 0:
        return original(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
            logit_scale, outputs,
        )  # fmt: skip
    capped = final_logit_softcapping is not None
    cap = (final_logit_softcapping or 0.0) / logit_scale
    head = LinearHead(
        hidden.contiguous()[None], weight, bias, cap, torch.ones_like(targets, dtype=torch.bool),
        *_chunking(hidden, cap),
    )  # fmt: skip
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
    if not _takes(hidden, weight, bias, targets, ctx.compute_dtype):
        return original(ctx, grad_logprobs, grad_entropy, *_)
    given = [g for g in (grad_logprobs, grad_entropy) if g is not None]
    if not given:
        return (None,) * 9
    # our own say more of logsumexp than its float32 sum does
    stats = getattr(ctx, "stats", None)
    if stats is None:
        stats = torch.stack([torch.zeros_like(log_z), log_z], -1)
    mask = None
    if hidden.device.type == "cpu":
        mask = torch.stack(given).any(0)
        stats = stats[mask]
    scale = ctx.kernel_args["logit_scale"]
    cap = ctx.kernel_args["softcap"] / scale if ctx.kernel_args["HAS_SOFTCAP"] else 0.0
    wanted = list(ctx.needs_input_grad[:3])
    gradients = linear_logprobs_backward(
        hidden.contiguous()[None], weight, bias, targets, 1 / (ctx.kernel_args["inv_t"] * scale),
        None, mask, NONE_IGNORED, cap, *_chunking(hidden, cap), dispatch.choose(hidden, None), "",
        None if grad_entropy is None else entropy, stats, None, grad_logprobs, grad_entropy, wanted,
        False,
    )  # fmt: skip
    likes = zip(gradients, (hidden, weight, bias), wanted, strict=True)
    return (*(g.view(x.shape) if want else None for g, x, want in likes), *(None,) * 6)


def _takes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> bool:
    return (
        served(hidden, weight, bias)
        and hidden.dtype == weight.dtype == dtype
        and targets.dtype == torch.int64
        and targets.device == hidden.device
        and weight.numel() > 0
        and not hasattr(weight, "ds_id")
        and dispatch.choose(hidden, None) != "reference"
    )


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


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
    dispatch.load(dispatch.choose(logits, None)).logprobs_forward(
        *logits.shape, logits, targets, temperature, None, None, NONE_IGNORED, logp,
        None if entropy is None else entropy[:, part], stats, workspace(logits),
    )  # fmt: skip
