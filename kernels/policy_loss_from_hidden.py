"""Policy loss from hidden states and the linear head: the gradients are computed with the loss, in
three matrix products, with no tensor of tokens x vocabulary.

    loss = policy_loss(logp, ...),   logp as of `linear_logprobs`

Where the coefficient of a token follows from its own logits, a chunk of tokens goes through once:
its logits, its logprobs and entropies, d loss / d logp and d loss / d entropy, d loss / d logits
over the logits, d hidden and d weight. That is so for ratios of tokens; for ratios of sequences and
prefixes while the policy has not moved, where they are 1. Elsewhere the logprobs of all tokens come
first, and the backward pass computes the logits anew: four products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels.linear_head import LinearHead, check_chunking, check_head
from warpo.kernels.linear_logprobs import linear_logprobs_and_entropy
from warpo.kernels.objectives import SURROGATES, Objective, get_objective
from warpo.kernels.policy_loss import (
    MIN_PARTIALS,
    _check_tensors,
    _denominator,
    _kl_term,
    policy_loss,
)
from warpo.kernels.policy_loss import _forward as _loss_and_metrics
from warpo.kernels.policy_metrics import METRICS
from warpo.kernels.registration import Operator


class PolicyLossFromHidden(NamedTuple):
    loss: Tensor
    metrics: Tensor
    logprobs: Tensor
    entropy: Tensor


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    objective: str | Objective,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
    num_valid: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> PolicyLossFromHidden:
    """Loss of a batch of sequences under an objective, from hidden states and the linear head.

    Args:
        hidden: (B, T, H) padded, or (N, H) packed with cu_seqlens. As in `linear_logprobs`.
            Differentiable.
        weight: (V, H) in the dtype of hidden. Differentiable.
        targets: (B, T) or (N,) int64, the taken tokens.
        old_logprobs: like targets; None: the policy has not moved, and the ratio is exactly 1. This
            and the arguments below that `policy_loss` has too are as there.
        advantages: like targets, or one a sequence: (B,).
        objective: name of a row ("grpo", "dapo", ...) or an `Objective`.
        bias: (V,) float32 | bfloat16 | float16. Differentiable.
        temperature, softcap: of the logits, as in `linear_logprobs`.
        mask: like targets. Masked tokens take no part in the matrix products.
        cu_seqlens: (B + 1,) int32. Tokens outside all sequences count as masked.
        ignore_index: a target of this value counts as masked.
        ref_logprobs, sampler_logprobs, kl_coef, denominator: as in `policy_loss`.
        num_valid, workspace_bytes, logits_dtype: as in `linear_logprobs`.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to hidden, weight and bias.
        metrics: (15,) float32 in the order of METRICS, the entropy among them.
        logprobs, entropy: like targets, float32, of all tokens; constants.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.

    Source: the row of the objective. Memory beyond arguments and results: workspace_bytes, 4 V H
    bytes for the gradient of a weight that is not float32, and from the loss to its backward the
    gradients.
    """
    objective = get_objective(objective)
    rows = check_head(hidden, weight, bias, targets, temperature, mask, softcap)
    chunking = check_chunking(hidden, num_valid, workspace_bytes, logits_dtype)
    stand_in = hidden.new_empty((), dtype=torch.float32).expand(targets.shape)
    constants = (
        stand_in if old_logprobs is None else old_logprobs,
        advantages,
        mask,
        cu_seqlens,
        ref_logprobs,
        sampler_logprobs,
    )
    num_sequences = _check_tensors(stand_in, *constants, None)
    valid = _valid(targets, mask, ignore_index, cu_seqlens)
    denominator = _denominator(denominator, objective, stand_in, valid, num_sequences)
    name = dispatch.choose(hidden, backend)
    shared = {
        "mask": valid,
        "cu_seqlens": cu_seqlens,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "kl_coef": kl_coef,
        "denominator": denominator,
        "backend": name,
    }
    surrogate = _token_surrogate(objective, old_logprobs, advantages, targets)
    if name == "reference" or surrogate is None:
        logp, entropy = linear_logprobs_and_entropy(
            hidden, weight, targets, bias=bias, temperature=temperature, mask=valid,
            softcap=softcap, num_valid=num_valid, workspace_bytes=workspace_bytes,
            logits_dtype=logits_dtype, backend=name,
        )  # fmt: skip
        if objective.entropy_coef == 0:
            entropy = entropy.detach()
        result = policy_loss(logp, old_logprobs, advantages, objective, entropy=entropy, **shared)
        return PolicyLossFromHidden(*result, logp.detach(), entropy.detach())
    kl, kl_coef, adaptive_kl_coef = _kl_term(kl_coef, objective, ref_logprobs, stand_in)
    if objective.correction != "none" and sampler_logprobs is None:
        raise ValueError(
            f"correction {objective.correction!r} needs sampler_logprobs; or set it to 'none'"
        )
    recording = torch.is_grad_enabled()
    wanted = [recording and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    per_token = isinstance(temperature, Tensor)
    loss, metrics, logp, entropy, _, _, _ = _operator(
        rows, weight, bias, targets, 1.0 if per_token else temperature,
        temperature if per_token else None, softcap or 0.0, *chunking, surrogate,
        _token_weights(valid, cu_seqlens, objective, denominator), old_logprobs, advantages,
        ref_logprobs if kl else None,
        sampler_logprobs if objective.correction != "none" else None, valid, cu_seqlens,
        *objective.ratio_arguments, kl, objective.kl_gradient == "k2", kl_coef, adaptive_kl_coef,
        objective.entropy_coef, objective.log_ratio_limit,
        objective.aggregation == "sequence-mean-token-mean", denominator, wanted, name,
    )  # fmt: skip
    return PolicyLossFromHidden(loss, metrics, logp, entropy)


def _token_surrogate(
    objective: Objective, old_logprobs: Tensor | None, advantages: Tensor, targets: Tensor
) -> int | None:
    """The surrogate that gives each token its coefficient at token level, None if none does."""
    if objective.correction != "none" and objective.correction_level == "sequence":
        return None
    surrogate = SURROGATES.index(objective.surrogate)
    if objective.ratio_level == "token":
        return surrogate
    if old_logprobs is not None:
        return None
    if objective.ratio_level == "prefix":
        return surrogate
    # the mean of a sequence's derivatives is each of them where they are equal
    if objective.correction != "none" or advantages.shape == targets.shape:
        return None
    return SURROGATES.index("none") if objective.surrogate == "geometric" else surrogate


def _valid(
    targets: Tensor, mask: Tensor | None, ignore_index: int, cu_seqlens: Tensor | None
) -> Tensor:
    """Like targets, bool: the tokens that count."""
    valid = targets != ignore_index
    if mask is not None:
        valid = valid & (mask != 0)
    if cu_seqlens is not None:
        place = torch.arange(targets.shape[0], device=targets.device)
        valid = valid & (place >= cu_seqlens[0]) & (place < cu_seqlens[-1])
    return valid


def _sequences(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Sequence of each packed token; one past the last for those behind all of them."""
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:], place, right=True)


def _token_weights(
    valid: Tensor, cu_seqlens: Tensor | None, objective: Objective, denominator: Tensor
) -> Tensor:
    """Like targets, float32: what the loss of each token is multiplied by."""
    weight = torch.where(denominator > 0, 1 / denominator, 0)
    if objective.aggregation != "sequence-mean-token-mean":
        return weight.expand(valid.shape)
    if cu_seqlens is None:
        return (weight / valid.sum(1, keepdim=True).clamp(min=1)).expand(valid.shape)
    before = torch.cat([valid.new_zeros((1,), dtype=torch.int64), valid.cumsum(0)])
    counts = before[cu_seqlens[1:].long()] - before[cu_seqlens[:-1].long()]
    counts = torch.cat([counts, counts.new_ones((1,))]).clamp(min=1)
    return weight / counts[_sequences(cu_seqlens, valid.shape[0])]


def _token_advantages(advantages: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Like targets."""
    if advantages.shape == targets.shape:
        return advantages
    if cu_seqlens is None:
        return advantages[:, None].expand(targets.shape)
    padded = torch.cat([advantages, advantages.new_zeros((1,))])
    return padded[_sequences(cu_seqlens, targets.shape[0])]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    num_valid: int,
    workspace_bytes: int,
    float32_logits: bool,
    token_surrogate: int,
    token_weights: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    valid: Tensor,
    cu_seqlens: Tensor | None,
    ratio_level: int,
    surrogate: int,
    ratio_low: float,
    ratio_high: float,
    dual_clip: float,
    tau_positive: float,
    tau_negative: float,
    correction: int,
    correction_sequence: bool,
    correction_low: float,
    correction_high: float,
    kl: int,
    kl_straight_through: bool,
    kl_coef: float,
    adaptive_kl_coef: Tensor | None,
    entropy_coef: float,
    log_ratio_limit: float,
    sequence_mean: bool,
    denominator: Tensor,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, logprobs and entropy of every token, gradients of hidden, weight, bias."""
    head = LinearHead(
        hidden, weight, bias, softcap, valid.reshape(-1), num_valid, workspace_bytes,
        float32_logits, gradient_buffer=softcap != 0 and any(wanted),
    )  # fmt: skip
    of_ratio = (
        ratio_low, ratio_high, dual_clip, tau_positive, tau_negative, correction,
        correction_sequence, correction_low, correction_high,
    )  # fmt: skip
    of_loss = (
        kl, kl_straight_through, kl_coef, adaptive_kl_coef, entropy_coef, log_ratio_limit,
    )  # fmt: skip
    logp, entropy, gradients = _chunks(
        head, targets, temperature, token_temperature, valid, token_weights,
        (old_logprobs, _token_advantages(advantages, targets, cu_seqlens), ref_logprobs,
         sampler_logprobs),
        (0, token_surrogate, *of_ratio), of_loss, wanted, backend,
    )  # fmt: skip
    loss, metrics, _ = _loss_and_metrics(
        logp, entropy, logp if old_logprobs is None else old_logprobs, advantages, ref_logprobs,
        sampler_logprobs, valid, cu_seqlens, ratio_level, surrogate, *of_ratio, *of_loss,
        sequence_mean, denominator, False, False, backend,
    )  # fmt: skip
    gradients = tuple(hidden.new_empty((0,)) if g is None else g for g in gradients)
    return loss, metrics, logp, entropy, *gradients


def _chunks(
    head: LinearHead,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    valid: Tensor,
    token_weights: Tensor,
    constants: tuple[Tensor | None, ...],
    ratio_arguments: tuple,
    loss_arguments: tuple,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """logprobs and entropy like targets, and the gradients of hidden, weight and bias."""
    kernels = dispatch.load(backend)
    head.start_gradients(*wanted)
    tokens = [
        head.compact(x) for x in (targets, token_temperature, valid, token_weights, *constants)
    ]
    one = torch.ones((), device=targets.device)
    logp, entropy = (one.new_empty((1, head.count)) for _ in range(2))
    stats = one.new_empty((1, head.count, 2))
    results, partials = (
        one.new_empty((1 + len(METRICS),)),
        one.new_empty((MIN_PARTIALS, len(METRICS))),
    )
    buffer = head.new_buffer()
    grad_buffer = head.new_buffer() if head.softcap and any(wanted) else buffer
    for start, stop in head.chunks():
        own = slice(start, stop)
        chosen, warm, flags, weights, old, advantage, ref, sampler = (
            None if x is None else x[:, own] for x in tokens
        )
        logits = head.logits(start, stop, buffer)
        inputs = (1, *logits.shape, logits[None], chosen, temperature, warm, flags, NO_INDEX)
        of_chunk = (logp[:, own], entropy[:, own])
        kernels.logprobs_forward(*inputs, *of_chunk, stats[:, own])
        if not any(wanted):
            continue
        grads = one.new_zeros((2, 1, stop - start))
        kernels.policy_loss(
            1, stop - start, None, of_chunk[0], of_chunk[0] if old is None else old, advantage,
            ref, sampler, of_chunk[1], flags, *ratio_arguments, *loss_arguments, False, one,
            grads[0], grads[1] if loss_arguments[4] else None, partials, results[0], results[1:],
        )  # fmt: skip
        grad_logits = grad_buffer[: stop - start]
        grads *= weights
        kernels.logprobs_backward(
            *inputs, None, of_chunk[1], stats[:, own], grads[0],
            grads[1] if loss_arguments[4] else None, grad_logits[None],
        )  # fmt: skip
        head.add_gradients(start, stop, logits, grad_logits)
    shape = targets.shape
    return head.spread(logp[0]).view(shape), head.spread(entropy[0]).view(shape), head.gradients()


# No target has it: what is ignored is masked already.
NO_INDEX = -(2**63)


def _fake_forward(hidden, weight, bias, targets, *arguments):
    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return hidden.new_empty((0,))
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    wanted = arguments[-2]
    return (
        *(
            hidden.new_empty(shape, dtype=torch.float32)
            for shape in ((), (len(METRICS),), targets.shape, targets.shape)
        ),
        *(like(x, want) for x, want in zip((hidden, weight, bias), wanted, strict=True)),
    )


def _save(ctx, inputs, output) -> None:
    ctx.wanted = inputs[-2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])


def _differentiate(ctx, grad_loss, *_):
    nothing = (None,) * 36
    if grad_loss is None:
        return (None, None, None, *nothing)
    # a scalar of shape () would be rounded to the dtype of the gradient, this one is not
    factor = grad_loss.view(1)
    scaled = (
        torch.mul(gradient, factor, out=torch.empty_like(gradient)) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return (*scaled, *nothing)


_operator = Operator(
    "policy_loss_from_hidden", _forward, _fake_forward, _save, _differentiate, differentiable=3
)
