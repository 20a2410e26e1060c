"""The policy loss from logits: loss and gradient from one read of them.

    logp_t = log softmax(logits_t / T)[y_t], H_t its entropy; then loss_t as in `policy_loss`
    d loss / d logits_tj = (g_t (1[j = y_t] - p_tj) - h_t p_tj (log p_tj + H_t)) / T
    with g_t = d loss / d logp_t, h_t = d loss / d H_t

Where g_t follows from the logits of its token alone, the gradient is written while the row is still
in the cache, and the loss from the logprobs afterwards. So it is with a ratio per token; and, as a
policy that has not moved has ratios of exactly 1, then also with one per sequence or prefix:

    old_logprobs   ratio per token   ratio per sequence   per prefix   correction per sequence
    None           one read          one read (*)         one read     two reads
    given          one read          two reads            two reads    two reads

(*) where the advantages are one per sequence, and no correction is one per token; or the surrogate
has no gradient through the ratio: of a product only the latter. A KL of the sequence takes two
reads. Two reads are `logprobs_and_entropy` and `policy_loss`, with their gradients.

Sources: those of `logprobs` and `policy_loss`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.logprobs import LogprobsArguments
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments
from warpo.kernels._arguments.policy_loss_from_logits import (
    PolicyLossFromLogitsArguments,
    ScaleGradientArguments,
)
from warpo.kernels._checks import as_rows, is_fake
from warpo.kernels._logprobs import check_inplace, check_logits, logprobs_and_entropy
from warpo.kernels._logprobs_operator import NO_INDEX
from warpo.kernels._offsets import in_a_sequence
from warpo.kernels._policy_loss import (
    PolicyLossInputs,
    check_correction,
    check_tokens,
    kl_penalty,
    launch_policy_loss,
    policy_loss,
)
from warpo.kernels._policy_metrics import METRICS
from warpo.kernels._registration import Operator
from warpo.kernels._sequence_mask import masks_sequences
from warpo.kernels._sequences import (
    count_denominator,
    empty_results,
    number_or_tensor,
    of_sequences,
)
from warpo.kernels.objectives import Objective, get_objective

# Their gradient does not go through the ratio, so it is the token's own at any level.
_OF_LOGP = ("stop_gradient", "reinforce", "gamma")


class PolicyLossFromLogitsInputs(NamedTuple):
    """What the operator takes: `PolicyLossFromLogitsArguments` before sizes and outputs."""

    logits: Tensor
    targets: Tensor
    temperature: float
    token_temperature: Tensor | None
    valid: Tensor
    cu_seqlens: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    objective: ObjectiveArguments
    kl_penalty: KlPenaltyArguments
    denominator: DenominatorArguments
    inplace: bool
    backend: str


class PolicyLossFromLogits(NamedTuple):
    loss: Tensor
    metrics: Tensor
    logprobs: Tensor
    entropy: Tensor


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    objective: str | Objective,
    *,
    old_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str | None = None,
) -> PolicyLossFromLogits:
    """`policy_loss` of the logprobs of the taken tokens, without a second read of the logits.

    Args:
        logits: (B, T, V) padded, or (N, V) packed with cu_seqlens; otherwise as for `logprobs`.
            Differentiable.
        targets: (B, T) or (N,) int64 | int32, as for `logprobs`.
        advantages: like targets or one per sequence, as for `policy_loss`.
        objective: name of a row ("grpo", "dapo", ...) or an `Objective`. Its entropy bonus is
            differentiated too.
        old_logprobs: of the policy when the step began. None: this policy is that one, in the
            first update on its own samples, and the ratio is exactly 1.
        temperature: as for `logprobs`.
        mask: like targets, bool | uint8. Where 0, nothing of the token is read (it may hold NaN),
            its results are 0 and its gradient is 0.
        cu_seqlens, ref_logprobs, sampler_logprobs, kl_coef, denominator: as for `policy_loss`.
        ignore_index: a target of this value counts as masked.
        inplace: write the gradient over the logits, which saves their size in memory. They are then
            gone when the call returns, or where it takes two reads after the backward pass: the
            backward of whatever else has saved them raises. Eager mode only.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to the logits, through one backward pass: the
            gradient is computed with the loss, and what arrives is multiplied into it.
        metrics: (16,) float32, as of `policy_loss`. A constant.
        logprobs, entropy: like targets, float32, 0 where masked. Constants.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.
        RuntimeError: a second backward pass.

    Memory beyond the arguments: the size of the logits, nothing of that size with inplace; 8 bytes
    per token for results, and what `policy_loss` takes.
    """
    objective = get_objective(objective)
    shape, targets, temperature = check_logits(logits, targets, temperature, mask)
    if len(shape) != (2 if cu_seqlens is None else 1):
        raise ValueError(
            "logits must be (B, T, V), or (N, V) together with cu_seqlens, "
            f"got {tuple(logits.shape)}"
        )
    like = logits.detach().select(-1, 0)
    old = like if old_logprobs is None else old_logprobs
    num_sequences = check_tokens(
        like, old, advantages, mask, cu_seqlens, ref_logprobs, sampler_logprobs, None
    )
    term = kl_penalty(kl_coef, objective, ref_logprobs, like)
    check_correction(objective, sampler_logprobs)
    valid = targets != ignore_index
    if mask is not None:
        valid &= mask != 0
    scale = count_denominator(
        denominator, objective.aggregation, like, valid, cu_seqlens, num_sequences
    )
    name = dispatch.choose(logits, backend)
    if inplace and name == "reference":
        raise ValueError("inplace is not supported by backend 'reference': leave it False")
    if inplace:
        check_inplace(logits)
    recording = logits.requires_grad and torch.is_grad_enabled()
    per_token = advantages.shape == shape
    reads = count_reads(objective, term, old_logprobs, per_token)
    if name == "reference" or not recording or reads == 2:
        if cu_seqlens is not None:
            valid &= in_a_sequence(cu_seqlens, targets.shape[0])
        logp, entropy = logprobs_and_entropy(
            logits,
            targets,
            temperature=temperature,
            mask=valid,
            ignore_index=ignore_index,
            inplace_backward=inplace,
            backend=name,
        )
        loss, metrics = policy_loss(
            logp,
            old_logprobs,
            advantages,
            objective,
            mask=valid,
            cu_seqlens=cu_seqlens,
            ref_logprobs=ref_logprobs,
            sampler_logprobs=sampler_logprobs,
            entropy=entropy if objective.entropy_coef else entropy.detach(),
            kl_coef=kl_coef,
            denominator=number_or_tensor(scale),
            backend=name,
        )
        return PolicyLossFromLogits(loss, metrics, logp.detach(), entropy.detach())
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = as_rows("temperature", temperature), 1.0
    inputs = PolicyLossFromLogitsInputs(
        logits=as_rows("logits", logits, keep=1),
        targets=as_rows("targets", targets),
        temperature=temperature,
        token_temperature=token_temperature,
        valid=valid,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs if term.kl else None,
        sampler_logprobs=sampler_logprobs if objective.correction != "none" else None,
        objective=objective.arguments,
        kl_penalty=term,
        denominator=scale,
        inplace=inplace,
        backend=name,
    )
    loss, metrics, logp, entropy, _ = _operator(inputs)
    return PolicyLossFromLogits(loss, metrics, logp.view(shape), entropy.view(shape))


def count_reads(
    objective: Objective, term: KlPenaltyArguments, old_logprobs: Tensor | None, per_token: bool
) -> int:
    """How often the logits must be read: 2 where a gradient needs the logprobs of other tokens."""
    if term.kl and objective.kl_level == "sequence":
        return 2
    if masks_sequences(objective, old_logprobs):
        return 2
    corrected = objective.correction != "none"
    if corrected and objective.correction_level == "sequence":
        return 2
    if objective.ratio_level == "token":
        return 1
    if old_logprobs is not None:
        return 2
    of_others = per_token or corrected or objective.ratio_level == "product"
    return 2 if objective.surrogate not in _OF_LOGP and of_others else 1


def _forward(
    inputs: PolicyLossFromLogitsInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, logprobs and entropy `[rows, steps]`, and the gradient of the logits."""
    logits, valid, cu_seqlens = inputs.logits, inputs.valid, inputs.cu_seqlens
    token_advantages, valid_tokens = of_sequences(
        inputs.advantages, valid, cu_seqlens, inputs.objective.sequence_mean
    )
    logp, entropy, gradient = _allocate(inputs)
    if logits.numel():
        rows, steps, vocab = logits.shape
        forward = LogprobsArguments(
            rows=rows,
            steps=steps,
            vocab=vocab,
            logits=logits,
            targets=inputs.targets,
            temperature=inputs.temperature,
            token_temperature=inputs.token_temperature,
            mask=_rows(valid),
            ignore_index=NO_INDEX,
            logprobs=logp,
            entropy=entropy,
            stats=None,
            partials=None,
        )
        arguments = PolicyLossFromLogitsArguments(
            objective=inputs.objective,
            kl_penalty=inputs.kl_penalty,
            forward=forward,
            sequences=valid.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
            cu_seqlens=cu_seqlens,
            old_logprobs=_rows(inputs.old_logprobs),
            advantages=as_rows("advantages", token_advantages),
            ref_logprobs=_rows(inputs.ref_logprobs),
            sampler_logprobs=_rows(inputs.sampler_logprobs),
            valid_tokens=_rows(valid_tokens),
            denominator=inputs.denominator,
            grad_logits=logits if inputs.inplace else gradient,
        )
        dispatch.load(inputs.backend).policy_loss_from_logits(arguments)
    if inputs.inplace:
        torch.autograd.graph.increment_version(logits)
    loss, metrics = loss_of_logprobs(inputs, logp.view(valid.shape), entropy.view(valid.shape))
    return loss, metrics, logp, entropy, gradient


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else as_rows("", tensor)


def loss_of_logprobs(inputs: Any, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and metrics of the logprobs, which a pass over logits or hidden states has computed.

    inputs: of that pass, with the fields that `PolicyLossInputs` has too.
    """
    of_logprobs = PolicyLossInputs(
        logprobs=logp,
        entropy=entropy,
        old_logprobs=logp if inputs.old_logprobs is None else inputs.old_logprobs,
        advantages=inputs.advantages,
        ref_logprobs=inputs.ref_logprobs,
        sampler_logprobs=inputs.sampler_logprobs,
        mask=inputs.valid,
        cu_seqlens=inputs.cu_seqlens,
        objective=inputs.objective,
        kl_penalty=inputs.kl_penalty,
        denominator=inputs.denominator,
        with_gradient=False,
        with_entropy_gradient=False,
        backend=inputs.backend,
    )
    loss, metrics, _ = launch_policy_loss(of_logprobs)
    return loss, metrics


def _allocate(inputs: PolicyLossFromLogitsInputs) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and the gradient."""
    rows, steps, vocab = inputs.logits.shape
    logp = inputs.logits.new_empty(rows, steps, dtype=torch.float32)
    return (
        logp,
        torch.empty_like(logp),
        inputs.logits.new_empty((0, 0, vocab) if inputs.inplace else inputs.logits.shape),
    )


def _fake_forward(
    inputs: PolicyLossFromLogitsInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*empty_results(inputs.denominator, inputs.logits, len(METRICS)), *_allocate(inputs))


def _save(ctx: Any, inputs: PolicyLossFromLogitsInputs, output: tuple[Tensor, ...]) -> None:
    ctx.backend, ctx.spent = inputs.backend, False
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs.logits if inputs.inplace else output[4])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None]:
    if grad_loss is None:
        return (None,)
    (gradient,) = ctx.saved_tensors
    if is_fake(gradient):  # as in eager mode, whose memory is planned
        return (gradient.detach(),)
    return (gradient * grad_loss,)


def _differentiate_eager(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None]:
    """What arrives is multiplied into the gradient on the device; 1 costs no pass over it."""
    if ctx.spent:
        raise RuntimeError(
            "policy_loss_from_logits computes its gradient once, with the loss: "
            "call policy_loss_from_logits again, or logprobs and policy_loss, "
            "to go through the graph twice"
        )
    if grad_loss is None:
        return (None,)
    ctx.spent = True
    gradient = ctx.saved_tensors[0].detach()
    if gradient.numel():
        scale_gradient(gradient, grad_loss, ctx.backend)
    return (gradient,)


def scale_gradient(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """The gradient `[rows, steps, V]` times a number on the device, in place."""
    rows, steps, vocab = gradient.shape
    arguments = ScaleGradientArguments(
        rows=rows, steps=steps, vocab=vocab, gradient=gradient, factor=factor
    )
    dispatch.load(backend).scale_gradient(arguments)
    torch.autograd.graph.increment_version(gradient)


_operator = Operator(
    "policy_loss_from_logits",
    _forward,
    _fake_forward,
    _save,
    _differentiate,
    differentiable=1,
    differentiate_eager=_differentiate_eager,
)
