"""The policy loss of every objective: loss, gradient and metrics of all tokens in one pass.

    loss_t = -c_t surrogate(ratio_t, A_t, logp_t) + kl_coef kl(logp_t, ref_t) - entropy_coef H_t
    loss   = sum of w_t loss_t,   w_t = 1 / denominator, or 1 / (tokens of the sequence x
                                  denominator)

with ratio, surrogate and correction c as the objective has them (`objectives.Objective`). Backward,
s_t the derivative of the surrogate with respect to the log ratio (0 where a bound is active):

    d loss / d logp_t = -w_t c_t s_t                       token level
                      = -(1 / n) sum_u w_u c_u s_u         sequence level, n valid tokens
                      = -sum_u w_u c_u s_u                 product of the sequence
                      = -w_t c_t clip(ratio_t) A_t         stop gradient, any level
                      = -w_t c_t A_t                       reinforce
    plus kl_coef w_t (1 | -d | 1 - e^d | -d e^d) for k1 | k2 | k3 | reverse_k3, with d = ref_t -
    logp_t (the latter two: 0 where d is above log_ratio_limit); of samples of the reference
    d = logp_t - ref_t, and the signs change; of a KL of the sequence d is its sum, times n
    d loss / d H_t    = -entropy_coef w_t

Sources: the rows of `objectives.OBJECTIVES`; PPO, https://arxiv.org/abs/1707.06347 eq. 7;
estimators of the KL, http://joschu.net/blog/kl-approx.html.
"""

from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import (
    MIN_PARTIALS,
    KlPenaltyArguments,
    PolicyLossArguments,
)
from warpo.kernels._checks import FLOATS, check_mask, check_no_grad, check_tensor
from warpo.kernels._offsets import check_values, sequence_of_tokens
from warpo.kernels._policy_metrics import METRICS
from warpo.kernels._registration import Operator
from warpo.kernels._sequence_mask import mask_sequences, masks_sequences
from warpo.kernels._sequences import (
    check_sequences,
    count_denominator,
    denominator_tensor,
    empty_float32,
    empty_results,
    scaled,
)
from warpo.kernels.objectives import Objective, get_objective


class PolicyLossInputs(NamedTuple):
    """What the operator takes: `PolicyLossArguments` before sizes and outputs."""

    logprobs: Tensor
    entropy: Tensor | None
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    objective: ObjectiveArguments
    kl_penalty: KlPenaltyArguments
    denominator: DenominatorArguments
    with_gradient: bool
    with_entropy_gradient: bool
    backend: str


class PolicyLoss(NamedTuple):
    loss: Tensor
    metrics: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    objective: str | Objective,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Loss of a batch of sequences under an objective of `objectives.OBJECTIVES`, or one of your
    own.

    Args:
        logprobs: (B, T) padded, or (N,) packed with cu_seqlens. float32 | bfloat16 | float16, any
            strides. Differentiable.
        old_logprobs: like logprobs: of the policy when the step began. A constant. None: this
            policy is that one, in the first update on its own samples: the ratio is exactly 1.
        advantages: like logprobs, or one per sequence: (B,). Where both fit, N = B, it is one per
            token. A constant.
        objective: name of a row ("grpo", "dapo", ...) or an `Objective`.
        mask: like logprobs, bool | uint8. Masked slots are never read (they may hold NaN); their
            gradient is 0. Weights w of tokens, without KL and entropy bonus: the loss of a token is
            proportional to its advantage, so pass advantages * w, mask=w > 0 and
            denominator=w.sum(); in general, the loss of each token to `aggregate`.
        cu_seqlens: (B + 1,) int32, not descending, within [0, N]: sequence b is
            logprobs[cu_seqlens[b] : cu_seqlens[b + 1]]. Tokens of no sequence, the padding of a
            pack, are never read and do not count; their gradient is 0. On a GPU a malformed
            sequence makes the loss NaN.
        ref_logprobs: like logprobs: of the frozen reference. Required where kl_coef is not 0. A
            constant.
        sampler_logprobs: like logprobs: as the sampler computed them. Required where the objective
            has a correction, unused elsewhere. A constant. NaN at a valid token makes the loss NaN,
            unless the objective has correction_nan "mask"; -inf has a weight beyond every bound.
        entropy: like logprobs: of the policy's distribution at each token, nats. Differentiable.
            Required where entropy_coef is not 0; elsewhere it enters the metrics alone, without a
            gradient.
        kl_coef: in place of that of the objective: a number, or a float32 scalar tensor on the
            device, which may change from step to step at no cost (the adaptive coefficient of PPO).
        denominator: what the aggregation divides by, a number or a scalar tensor. For
            gradients that do not depend on the split into micro-batches, pass the count of the
            whole optimizer step: valid tokens for "token-mean", sequences for the others, times the
            constant length for "...-norm". Not given: the count in this call; "...-norm" has no
            default. 0 gives loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to logprobs and entropy. The gradients are
            computed with the loss.
        metrics: (16,) float32 in the order of METRICS, on the device; `policy_metrics` reads it. A
            constant. The three losses are final; the others are sums over valid tokens, so that
            those of micro-batches add up; log_ratio is logp - old of the token at any level.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or on the CPU cu_seqlens are
            not.

    Source: see the module and the row of the objective. Memory beyond arguments and results: 4
    bytes per token for each of the two gradients, 64 bytes per sequence and at least 32 KiB.
    """
    objective = get_objective(objective)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    num_sequences = check_tokens(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        cu_seqlens,
        ref_logprobs,
        sampler_logprobs,
        entropy,
    )
    term = kl_penalty(kl_coef, objective, ref_logprobs, logprobs)
    check_correction(objective, sampler_logprobs)
    if objective.entropy_coef != 0 and entropy is None:
        raise ValueError(
            f"entropy_coef = {objective.entropy_coef} needs entropy; or set entropy_coef to 0"
        )
    scale = count_denominator(
        denominator, objective.aggregation, logprobs, mask, cu_seqlens, num_sequences
    )
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        check_values("cu_seqlens", cu_seqlens, logprobs.numel())
        loss, metrics = reference.policy_loss(
            logprobs.float(),
            old_logprobs.float(),
            _per_token(advantages.float(), logprobs, cu_seqlens),
            objective,
            denominator_tensor(scale, logprobs),
            mask=mask,
            cu_seqlens=cu_seqlens,
            kl_coef=term.kl_coef if term.adaptive_kl_coef is None else term.adaptive_kl_coef,
            ref=None if term.kl == 0 or ref_logprobs is None else ref_logprobs.float(),
            sampler=None if sampler_logprobs is None else sampler_logprobs.float(),
            entropy=None if entropy is None else entropy.float(),
        )
        return PolicyLoss(loss, metrics)
    if masks_sequences(objective, old_logprobs):
        advantages = mask_sequences(
            objective, logprobs, old_logprobs, sampler_logprobs, advantages, mask, cu_seqlens
        )
    recording = torch.is_grad_enabled()
    inputs = PolicyLossInputs(
        logprobs=logprobs,
        entropy=entropy,
        old_logprobs=old_logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs if term.kl else None,
        sampler_logprobs=sampler_logprobs if objective.correction != "none" else None,
        mask=mask,
        cu_seqlens=cu_seqlens,
        objective=objective.arguments,
        kl_penalty=term,
        denominator=scale,
        with_gradient=recording and logprobs.requires_grad,
        with_entropy_gradient=recording and objective.entropy_coef != 0 and _requires_grad(entropy),
        backend=name,
    )
    return PolicyLoss(*_operator(inputs))


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def check_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> int:
    """Shapes, dtypes and devices; returns the number of sequences."""
    check_tensor("logprobs", logprobs, FLOATS)
    shape = logprobs.shape
    num_sequences = check_sequences("logprobs", logprobs, cu_seqlens)
    for name, tensor in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("sampler_logprobs", sampler_logprobs),
    ):
        if tensor is not None:
            check_tensor(name, tensor, FLOATS, shape, logprobs)
            check_no_grad(name, tensor)
    if entropy is not None:
        check_tensor("entropy", entropy, FLOATS, shape, logprobs)
    check_tensor("advantages", advantages, FLOATS, like=logprobs)
    check_no_grad("advantages", advantages)
    if advantages.shape != shape and advantages.shape != (num_sequences,):
        raise ValueError(
            f"advantages must be one per token, {tuple(shape)}, or one per sequence, "
            f"({num_sequences},), got {tuple(advantages.shape)}{_one_a_sequence(advantages)}"
        )
    check_mask("mask", mask, shape, logprobs)
    return num_sequences


def _one_a_sequence(advantages: Tensor) -> str:
    column = advantages.dim() == 2 and advantages.shape[1] == 1
    return ": pass advantages.squeeze(1)" if column else ""


def check_correction(objective: Objective, sampler_logprobs: Tensor | None) -> None:
    if objective.correction != "none" and sampler_logprobs is None:
        raise ValueError(
            f"correction {objective.correction!r} needs sampler_logprobs; or set it to 'none'"
        )


def kl_penalty(
    kl_coef: float | Tensor | None,
    objective: Objective,
    ref_logprobs: Tensor | None,
    logprobs: Tensor,
) -> KlPenaltyArguments:
    adaptive = None
    if kl_coef is None:
        kl_coef = objective.kl_coef
    elif isinstance(kl_coef, Tensor):
        check_tensor("kl_coef", kl_coef, (torch.float32,), (), logprobs)
        check_no_grad("kl_coef", kl_coef)
        adaptive, kl_coef = kl_coef, 0.0
    elif not kl_coef >= 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if adaptive is None and kl_coef == 0:
        return KlPenaltyArguments(kl=0, kl_coef=0.0, adaptive_kl_coef=None)
    if ref_logprobs is None:
        value = "a tensor" if adaptive is not None else kl_coef
        raise ValueError(f"kl_coef = {value} needs ref_logprobs; or set kl_coef to 0")
    return KlPenaltyArguments(
        kl=objective.kl_code,
        kl_coef=kl_coef,
        adaptive_kl_coef=adaptive,
    )


def _per_token(advantages: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if advantages.shape == logprobs.shape:
        return advantages
    if cu_seqlens is None:
        return advantages[:, None].expand(logprobs.shape)
    if advantages.numel() == 0:
        return torch.zeros_like(logprobs)
    return advantages[sequence_of_tokens(cu_seqlens, logprobs.numel())]


def launch_policy_loss(inputs: PolicyLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and the gradients with respect to logprobs and entropy, as wanted."""
    logprobs, advantages, cu_seqlens = inputs.logprobs, inputs.advantages, inputs.cu_seqlens
    check_values("cu_seqlens", cu_seqlens, logprobs.shape[-1])
    loss, metrics, gradients = _allocate(inputs)
    steps = logprobs.shape[-1]
    if cu_seqlens is None:
        sequences = logprobs.shape[0]
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(sequences, steps)
    else:
        gradients.zero_()  # of tokens that belong to no sequence
        sequences = cu_seqlens.numel() - 1
        if advantages.numel() == sequences != steps:
            advantages = advantages[:, None].expand(sequences, steps)
    both = inputs.with_gradient and inputs.with_entropy_gradient
    grad_logprobs, grad_entropy = gradients if both else (gradients, gradients)
    arguments = PolicyLossArguments(
        objective=inputs.objective,
        kl_penalty=inputs.kl_penalty,
        sequences=sequences,
        steps=steps,
        cu_seqlens=cu_seqlens,
        logprobs=logprobs,
        old_logprobs=inputs.old_logprobs,
        advantages=advantages,
        ref_logprobs=inputs.ref_logprobs,
        sampler_logprobs=inputs.sampler_logprobs,
        entropy=inputs.entropy,
        mask=inputs.mask,
        denominator=inputs.denominator,
        grad_logprobs=grad_logprobs if inputs.with_gradient else None,
        grad_entropy=grad_entropy if inputs.with_entropy_gradient else None,
        partials=metrics.new_empty(max(sequences, MIN_PARTIALS), len(METRICS)),
        loss=loss,
        metrics=metrics,
    )
    dispatch.load(inputs.backend).policy_loss(arguments)
    return loss, metrics, gradients


def _allocate(inputs: PolicyLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    loss, metrics = empty_results(inputs.denominator, inputs.logprobs, len(METRICS))
    gradients = inputs.with_gradient + inputs.with_entropy_gradient
    return (
        loss,
        metrics,
        metrics.new_empty(0)
        if gradients == 0
        else empty_float32(inputs.logprobs)
        if gradients == 1
        else metrics.new_empty((2, *inputs.logprobs.shape)),
    )


def _save(ctx: Any, inputs: PolicyLossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs.with_gradient, inputs.with_entropy_gradient
    ctx.dtypes = (inputs.logprobs.dtype, None if inputs.entropy is None else inputs.entropy.dtype)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object, scale: Any = mul) -> Any:
    of_logprobs, of_entropy = ctx.wanted
    if grad_loss is None or not (of_logprobs or of_entropy):
        return (None, None)
    gradients = scale(ctx.saved_tensors[0], grad_loss)
    grad_logprobs, grad_entropy = gradients if of_logprobs and of_entropy else (gradients,) * 2
    return (
        grad_logprobs.to(ctx.dtypes[0]) if of_logprobs else None,
        grad_entropy.to(ctx.dtypes[1]) if of_entropy else None,
    )


_operator = Operator(
    "policy_loss",
    launch_policy_loss,
    _allocate,
    _save,
    _differentiate,
    differentiable=2,
    differentiate_eager=partial(_differentiate, scale=scaled),
    returned=2,
)
