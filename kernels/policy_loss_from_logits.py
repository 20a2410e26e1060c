"""The policy loss from logits: loss and gradient from one read of them.

    logp_t = log softmax(logits_t / T)[y_t], H_t its entropy; then loss_t as in `policy_loss`
    d loss / d logits_tj = (g_t (1[j = y_t] - p_tj) - h_t p_tj (log p_tj + H_t)) / T
    with g_t = d loss / d logp_t, h_t = d loss / d H_t

Where g_t follows from the logits of its token alone, the gradient is written while the row is still
in the cache, and the loss from the logprobs afterwards. So it is with a ratio a token; and, as a
policy that has not moved has ratios of exactly 1, then also with one a sequence or a prefix:

    old_logprobs   ratio a token   ratio a sequence   ratio a prefix   correction of a sequence
    None           one read        one read (*)       one read         two reads
    given          one read        two reads          two reads        two reads

(*) where the advantages are one a sequence, and no correction is one a token; or the surrogate has
no gradient through the ratio. Two reads are `logprobs_and_entropy` and `policy_loss`, with their
gradients.

Sources: those of `logprobs` and `policy_loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels.checks import as_rows
from warpo.kernels.logprobs import check_inplace, check_logits, logprobs_and_entropy
from warpo.kernels.objectives import Objective, get_objective
from warpo.kernels.offsets import (
    check_values,
    in_a_sequence,
    is_malformed,
    sequence_of_tokens,
)
from warpo.kernels.policy_loss import (
    check_tokens,
    kl_term,
    launch_policy_loss,
    policy_loss,
)
from warpo.kernels.policy_metrics import METRICS
from warpo.kernels.registration import Operator
from warpo.kernels.sequences import count_denominator

# Their gradient does not go through the ratio, so it is the token's own at any level.
_OF_LOGP = ("stop_gradient", "reinforce")


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
        advantages: like targets or one a sequence, as for `policy_loss`.
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
    a token for results, and what `policy_loss` takes.
    """
    objective = get_objective(objective)
    shape, targets, temperature = check_logits(logits, targets, temperature, mask)
    if len(shape) != (2 if cu_seqlens is None else 1):
        raise ValueError(
            "logits must be (B, T, V), or (N, V) together with cu_seqlens, "
            f"got {tuple(logits.shape)}"
        )
    like = logits.detach().select(-1, 0)
    num_sequences = check_tokens(
        like, like if old_logprobs is None else old_logprobs, advantages, mask, cu_seqlens,
        ref_logprobs, sampler_logprobs, None,
    )  # fmt: skip
    kl, kl_number, adaptive_kl_coef = kl_term(kl_coef, objective, ref_logprobs, like)
    if objective.correction != "none" and sampler_logprobs is None:
        raise ValueError(
            f"correction {objective.correction!r} needs sampler_logprobs; or set it to 'none'"
        )
    valid = targets != ignore_index
    if mask is not None:
        valid &= mask != 0
    denominator = count_denominator(
        denominator, objective.aggregation, like, valid, cu_seqlens, num_sequences
    )
    name = dispatch.choose(logits, backend)
    if inplace and name == "reference":
        raise ValueError("inplace is not supported by backend 'reference': leave it False")
    if inplace:
        check_inplace(logits)
    recording = logits.requires_grad and torch.is_grad_enabled()
    per_token = advantages.shape == shape
    if name == "reference" or not recording or count_reads(objective, old_logprobs, per_token) == 2:
        if cu_seqlens is not None:
            valid &= in_a_sequence(cu_seqlens, targets.shape[0])
        logp, entropy = logprobs_and_entropy(
            logits, targets, temperature=temperature, mask=valid, ignore_index=ignore_index,
            inplace_backward=inplace, backend=name,
        )  # fmt: skip
        loss, metrics = policy_loss(
            logp, old_logprobs, advantages, objective, mask=valid, cu_seqlens=cu_seqlens,
            ref_logprobs=ref_logprobs, sampler_logprobs=sampler_logprobs,
            entropy=entropy if objective.entropy_coef else entropy.detach(), kl_coef=kl_coef,
            denominator=denominator, backend=name,
        )  # fmt: skip
        return PolicyLossFromLogits(loss, metrics, logp.detach(), entropy.detach())
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = as_rows("temperature", temperature), 1.0
    loss, metrics, logp, entropy, _ = _operator(
        as_rows("logits", logits, keep=1),
        as_rows("targets", targets),
        temperature,
        token_temperature,
        valid,
        ignore_index,
        cu_seqlens,
        old_logprobs,
        advantages,
        ref_logprobs if kl else None,
        sampler_logprobs if objective.correction != "none" else None,
        *objective.ratio_arguments,
        kl,
        objective.kl_gradient == "k2",
        kl_number,
        adaptive_kl_coef,
        objective.entropy_coef,
        objective.log_ratio_limit,
        objective.aggregation == "sequence-mean-token-mean",
        denominator,
        inplace,
        name,
    )
    return PolicyLossFromLogits(loss, metrics, logp.view(shape), entropy.view(shape))


def count_reads(objective: Objective, old_logprobs: Tensor | None, per_token: bool) -> int:
    """How often the logits must be read: 2 where a gradient needs the logprobs of other tokens."""
    corrected = objective.correction != "none"
    if corrected and objective.correction_level == "sequence":
        return 2
    if objective.ratio_level == "token":
        return 1
    if old_logprobs is not None:
        return 2
    return 2 if objective.surrogate not in _OF_LOGP and (per_token or corrected) else 1


def of_sequences(
    advantages: Tensor, valid: Tensor, cu_seqlens: Tensor | None, sequence_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """What is one a sequence, for each token: the advantage, and the number of valid tokens.

    Advantages are NaN, and with them all gradients, where malformed offsets are on a GPU.

    Raises:
        ValueError: they are on the CPU.
    """
    checked = check_values("cu_seqlens", cu_seqlens, valid.shape[-1])
    if cu_seqlens is None:
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(valid.shape)
        if not sequence_mean:
            return advantages, None
        return advantages, valid.sum(1, keepdim=True, dtype=torch.float32).expand(valid.shape)
    per_token = advantages.shape == valid.shape
    if per_token and not sequence_mean and checked:
        return advantages, None
    tokens, sequences = valid.shape[0], cu_seqlens.numel() - 1
    if sequences == 0:
        return valid.new_zeros(tokens, dtype=torch.float32), None
    sequence = sequence_of_tokens(cu_seqlens, tokens)
    if not per_token:
        advantages = advantages[sequence]
    if not checked:
        advantages = torch.where(is_malformed(cu_seqlens, tokens), torch.nan, advantages)
    if not sequence_mean:
        return advantages, None
    before = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
    ends = before[cu_seqlens.long().clamp(0, tokens)]
    return advantages, ends.diff()[sequence].float()


def _forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    valid: Tensor,
    ignore_index: int,
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
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, logprobs and entropy `[rows, steps]`, and the gradient of the logits."""
    token_advantages, valid_tokens = of_sequences(advantages, valid, cu_seqlens, sequence_mean)
    _, _, logp, entropy, gradient = _allocate(logits, inplace)
    sequences = valid.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else as_rows("", tensor)

    if logits.numel():
        dispatch.load(backend).policy_loss_from_logits(
            *logits.shape, logits, targets, temperature, token_temperature, rows(valid),
            ignore_index, logp, entropy, None, None,
            sequences, cu_seqlens, rows(old_logprobs), rows(token_advantages), rows(ref_logprobs),
            rows(sampler_logprobs), rows(valid_tokens), surrogate, ratio_low, ratio_high, dual_clip,
            tau_positive, tau_negative, correction, correction_low, correction_high, kl,
            kl_straight_through, kl_coef, adaptive_kl_coef, entropy_coef, log_ratio_limit,
            denominator, logits if inplace else gradient,
        )  # fmt: skip
    if inplace:
        torch.autograd.graph.increment_version(logits)
    mine = logp.view(valid.shape)
    loss, metrics, _ = launch_policy_loss(
        mine, entropy.view(valid.shape), mine if old_logprobs is None else old_logprobs, advantages,
        ref_logprobs, sampler_logprobs, valid, cu_seqlens, ratio_level, surrogate, ratio_low,
        ratio_high, dual_clip, tau_positive, tau_negative, correction, correction_sequence,
        correction_low, correction_high, kl, kl_straight_through, kl_coef, adaptive_kl_coef,
        entropy_coef, log_ratio_limit, sequence_mean, denominator, False, False, backend,
    )  # fmt: skip
    return loss, metrics, logp, entropy, gradient


def _allocate(logits: Tensor, inplace: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, steps, vocab = logits.shape
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((len(METRICS),), dtype=torch.float32),
        logits.new_empty((rows, steps), dtype=torch.float32),
        logits.new_empty((rows, steps), dtype=torch.float32),
        logits.new_empty((0, 0, vocab) if inplace else logits.shape),
    )


def _fake_forward(logits, *arguments):
    return _allocate(logits, arguments[-2])


def _save(ctx, inputs, output) -> None:
    ctx.inplace, ctx.backend = inputs[-2:]
    ctx.spent = False
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0] if ctx.inplace else output[4])


def _differentiate(ctx, grad_loss, *_):
    nothing = (None,) * 31
    if grad_loss is None:
        return (None, *nothing)
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss, *nothing)


def _differentiate_eager(ctx, grad_loss, *_):
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
        dispatch.load(ctx.backend).scale_gradient(*gradient.shape, gradient, grad_loss)
        torch.autograd.graph.increment_version(gradient)
    return (gradient,)


_operator = Operator(
    "policy_loss_from_logits", _forward, _fake_forward, _save, _differentiate, differentiable=1,
    differentiate_eager=_differentiate_eager,
)  # fmt: skip
