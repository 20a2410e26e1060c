"""Policy loss from hidden states and the linear head: the gradients are computed with the loss, in
three matrix products, with no tensor of tokens x vocabulary.

    loss = policy_loss(logp, ...),   logp as of `linear_logprobs`

Where the coefficient of a token follows from its own logits (`policy_loss_from_logits` says where
that is), a chunk of tokens goes through once: its logits, d loss / d logits over them from one
read, d hidden and d weight. Elsewhere the logprobs of all tokens come first, by `linear_logprobs`:
three products where the logits fit in workspace_bytes, else four.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels.linear_head import LinearHead, check_chunking, check_head
from warpo.kernels.linear_logprobs import linear_logprobs_and_entropy
from warpo.kernels.logprobs import workspace
from warpo.kernels.objectives import Objective, get_objective
from warpo.kernels.offsets import in_a_sequence
from warpo.kernels.policy_loss import (
    check_tokens,
    kl_term,
    launch_policy_loss,
    policy_loss,
)
from warpo.kernels.policy_loss_from_logits import count_reads, of_sequences
from warpo.kernels.policy_metrics import METRICS
from warpo.kernels.registration import Operator, keeps_graph
from warpo.kernels.sequences import count_denominator


class PolicyLossFromHidden(NamedTuple):
    loss: Tensor
    metrics: Tensor
    logprobs: Tensor
    entropy: Tensor


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    objective: str | Objective,
    *,
    old_logprobs: Tensor | None = None,
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
        targets: (B, T) or (N,) int64 | int32, the taken tokens.
        advantages: like targets, or one a sequence: (B,).
        objective: name of a row ("grpo", "dapo", ...) or an `Objective`.
        old_logprobs: like targets: of the policy when the step began. None: this policy is that
            one, in the first update on its own samples, and the ratio is exactly 1.
        bias: (V,) float32 | bfloat16 | float16. Differentiable.
        temperature, softcap: of the logits, as in `linear_logprobs`.
        mask: like targets. Masked tokens take no part in the matrix products.
        cu_seqlens: as in `policy_loss`. Tokens of no sequence count as masked.
        ignore_index: a target of this value counts as masked.
        ref_logprobs, sampler_logprobs, kl_coef, denominator: as in `policy_loss`.
        num_valid, workspace_bytes, logits_dtype: as in `linear_logprobs`.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to hidden, weight and bias.
        metrics: (16,) float32 in the order of METRICS, the entropy among them.
        logprobs, entropy: like targets, float32, of all tokens; constants.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.

    Source: the row of the objective. Memory beyond arguments and results: workspace_bytes, 4 V H
    bytes for the gradient of a weight that is not float32, and from the loss to its backward the
    gradients.
    """
    objective = get_objective(objective)
    rows, targets, temperature = check_head(
        hidden, weight, bias, targets, temperature, mask, softcap
    )
    chunking = check_chunking(hidden, num_valid, workspace_bytes, logits_dtype)
    stand_in = hidden.new_empty((), dtype=torch.float32).expand(targets.shape)
    num_sequences = check_tokens(
        stand_in, stand_in if old_logprobs is None else old_logprobs, advantages, mask, cu_seqlens,
        ref_logprobs, sampler_logprobs, None,
    )  # fmt: skip
    kl, kl_number, adaptive_kl_coef = kl_term(kl_coef, objective, ref_logprobs, stand_in)
    if objective.correction != "none" and sampler_logprobs is None:
        raise ValueError(
            f"correction {objective.correction!r} needs sampler_logprobs; or set it to 'none'"
        )
    valid = _valid(targets, mask, ignore_index, cu_seqlens)
    denominator = count_denominator(
        denominator, objective.aggregation, stand_in, valid, None, num_sequences
    )
    name = dispatch.choose(hidden, backend)
    per_token = advantages.shape == targets.shape
    if name == "reference" or count_reads(objective, old_logprobs, per_token) == 2:
        logp, entropy = linear_logprobs_and_entropy(
            hidden, weight, targets, bias=bias, temperature=temperature, mask=valid,
            softcap=softcap, num_valid=num_valid, workspace_bytes=workspace_bytes,
            logits_dtype=logits_dtype, backend=name,
        )  # fmt: skip
        if objective.entropy_coef == 0:
            entropy = entropy.detach()
        loss, metrics = policy_loss(
            logp, old_logprobs, advantages, objective, mask=valid, cu_seqlens=cu_seqlens,
            ref_logprobs=ref_logprobs, sampler_logprobs=sampler_logprobs, entropy=entropy,
            kl_coef=kl_coef, denominator=denominator, backend=name,
        )  # fmt: skip
        return PolicyLossFromHidden(loss, metrics, logp.detach(), entropy.detach())
    recording = torch.is_grad_enabled()
    wanted = [recording and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = temperature, 1.0
    loss, metrics, logp, entropy, _, _, _ = _operator(
        rows, weight, bias, targets, temperature, token_temperature, softcap or 0.0, *chunking,
        valid, cu_seqlens, old_logprobs, advantages, ref_logprobs if kl else None,
        sampler_logprobs if objective.correction != "none" else None,
        *objective.ratio_arguments, kl, objective.kl_gradient == "k2", kl_number, adaptive_kl_coef,
        objective.entropy_coef, objective.log_ratio_limit,
        objective.aggregation == "sequence-mean-token-mean", denominator, wanted, name,
    )  # fmt: skip
    return PolicyLossFromHidden(loss, metrics, logp, entropy)


def _valid(
    targets: Tensor, mask: Tensor | None, ignore_index: int, cu_seqlens: Tensor | None
) -> Tensor:
    """Like targets, bool: the tokens that count."""
    valid = targets != ignore_index
    if mask is not None:
        valid = valid & (mask != 0)
    if cu_seqlens is not None:
        valid = valid & in_a_sequence(cu_seqlens, targets.shape[0])
    return valid


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
    valid: Tensor,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
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
    token_advantages, valid_tokens = of_sequences(advantages, valid, cu_seqlens, sequence_mean)
    head = LinearHead(
        hidden, weight, bias, softcap, valid.reshape(-1), num_valid, workspace_bytes,
        float32_logits, gradient_buffer=softcap != 0 and any(wanted),
    )  # fmt: skip
    per_token = (
        targets, token_temperature, valid, old_logprobs, token_advantages, ref_logprobs,
        sampler_logprobs, valid_tokens,
    )  # fmt: skip
    of_ratio = (surrogate, ratio_low, ratio_high, dual_clip, tau_positive, tau_negative, correction)
    bounds = (correction_low, correction_high)
    of_kl = (kl, kl_straight_through, kl_coef, adaptive_kl_coef)
    of_loss = (*bounds, *of_kl, entropy_coef, log_ratio_limit)
    logp, entropy = _chunks(
        head, temperature, per_token, (*of_ratio, *of_loss, denominator), wanted,
        dispatch.load(backend),
    )  # fmt: skip
    objective: Any = (ratio_level, *of_ratio, correction_sequence, *of_loss)
    logp, entropy = logp.view(targets.shape), entropy.view(targets.shape)
    loss, metrics, _ = launch_policy_loss(  # type: ignore[call-arg]  # a star of unknown length
        logp, entropy, logp if old_logprobs is None else old_logprobs, advantages, ref_logprobs,
        sampler_logprobs, valid, cu_seqlens, *objective, sequence_mean, denominator,
        False, False, backend,
    )  # fmt: skip
    of_hidden, of_weight, of_bias = (
        hidden.new_empty((0,)) if gradient is None else gradient for gradient in head.gradients()
    )
    return loss, metrics, logp, entropy, of_hidden, of_weight, of_bias


def _chunks(
    head: LinearHead,
    temperature: float,
    per_token: tuple[Tensor | None, ...],
    objective: tuple[Any, ...],
    wanted: list[bool],
    kernels: Any,
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of every token; the gradients stay in the head."""
    head.start_gradients(wanted)
    tokens = [head.compact(x) for x in per_token]
    buffer = head.new_buffer()
    grad_buffer = head.new_buffer() if head.softcap and any(wanted) else buffer
    logp, entropy = (buffer.new_empty((1, head.count), dtype=torch.float32) for _ in range(2))
    for start, stop in head.chunks():
        chosen, warm, flags, *constants = (None if x is None else x[:, start:stop] for x in tokens)
        results = (logp[:, start:stop], entropy[:, start:stop])
        logits = head.logits(start, stop, buffer)
        inputs = (1, *logits.shape, logits[None], chosen, temperature, warm, flags, NO_INDEX)
        if not any(wanted):
            stats = logp.new_empty((1, stop - start, 2))
            kernels.logprobs_forward(*inputs, *results, stats, workspace(logits[None]))
            continue
        grad_logits = grad_buffer[: stop - start]
        kernels.policy_loss_from_logits(
            *inputs, *results, None, None, 1, None, *constants, *objective, grad_logits[None]
        )
        head.add_gradients(start, stop, logits, grad_logits)
    return head.spread(logp[0]), head.spread(entropy[0])


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
    ctx.wanted, ctx.backend = inputs[-2:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])


def _differentiate(ctx, grad_loss, *_):
    nothing = (None,) * 34
    if grad_loss is None:
        return (None, None, None, *nothing)
    # a scalar of shape () would be rounded to the dtype of the gradient, this one is not
    factor = grad_loss.view(1)
    scaled = (
        torch.mul(gradient, factor, out=torch.empty_like(gradient)) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return (*scaled, *nothing)


def _differentiate_eager(ctx, grad_loss, *_):
    """Where the graph is kept, of copies: on its last walk the gradients are scaled in place."""
    if grad_loss is None:
        return (None, None, None)
    kept = keeps_graph()
    kernels = dispatch.load(ctx.backend)
    gradients = [x.detach().clone() if kept else x.detach() for x in ctx.saved_tensors]
    for gradient in gradients:
        if gradient.numel():
            rows = gradient.view(1, -1, gradient.shape[-1])
            kernels.scale_gradient(*rows.shape, rows, grad_loss)
            torch.autograd.graph.increment_version(gradient)
    return tuple(
        gradient if want else None for gradient, want in zip(gradients, ctx.wanted, strict=True)
    )


_operator = Operator(
    "policy_loss_from_hidden", _forward, _fake_forward, _save, _differentiate, differentiable=3,
    differentiate_eager=_differentiate_eager,
)  # fmt: skip
