"""The clipped policy loss with a KL penalty: loss, gradient and metrics of all tokens in one pass.

    ratio_t = exp(logp_t - old_t), or for ratio_level "sequence" exp(mean over the sequence of logp
    - old) loss_t  = -min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef
    kl(logp_t, ref_t) loss    = sum of w_t loss_t,   w_t = 1 / denominator, or 1 / (tokens of the
    sequence x denominator)

Backward, where the unclipped branch is the smaller one or both are equal (0 elsewhere):

    d loss / d logp_t = -w_t ratio_t A_t                                     token level
                      = -(1 / n) sum_u w_u ratio A_u                         sequence level, n valid
                      tokens
    plus kl_coef w_t (1 | -d | 1 - e^d) for k1 | k2 | k3, with d = ref_t - logp_t

Sources: PPO, https://arxiv.org/abs/1707.06347 eq. 7; GRPO, https://arxiv.org/abs/2402.03300 eq. 3;
sequence level, GSPO, https://arxiv.org/abs/2507.18071 eq. 5; estimators of the KL,
http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels.checks import FLOATS, as_rows, check_mask, check_no_grad, check_tensor
from warpo.kernels.objectives import KL_ESTIMATORS, Objective, get_objective
from warpo.kernels.registration import Operator

METRICS = (
    "policy_loss",
    "kl_loss",
    "tokens",
    "clipped_low",
    "clipped_high",
    "ratio",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "kl",
)


class PolicyLoss(NamedTuple):
    loss: Tensor
    metrics: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    objective: str | Objective,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Loss of a batch of sequences under an objective of `objectives.OBJECTIVES`, or one of your
    own.

    Args:
        logprobs: (B, T) padded, or (N,) packed with cu_seqlens. float32 | bfloat16 | float16, any
            strides. Differentiable.
        old_logprobs: like logprobs: of the policy when the step began. A constant.
        advantages: like logprobs, or one a sequence: (B,). Where both fit, N = B, it is one a
            token. A constant.
        objective: name of a row ("grpo", "dapo", ...) or an `Objective`.
        mask: like logprobs, bool | uint8. Masked slots are never read (they may hold NaN); their
            gradient is 0.
        cu_seqlens: (B + 1,) int32: sequence b is logprobs[cu_seqlens[b] : cu_seqlens[b + 1]].
        ref_logprobs: like logprobs: of the frozen reference. Required where kl_coef > 0. A
            constant.
        denominator: what the aggregation divides by, a number or a float32 scalar tensor. For
            gradients that do not depend on the split into micro-batches, pass the count of the
            whole optimizer step: valid tokens for "token-mean", sequences for the others, times the
            constant length for "...-norm". Not given: the count in this call; "...-norm" has no
            default. 0 gives loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to logprobs. The gradient is computed with the
            loss.
        metrics: (10,) float32 in the order of METRICS, on the device; `policy_metrics` reads it.
            The two losses are final; the others are sums over valid tokens, so that those of
            micro-batches add up.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: see the module and the row of the objective. Memory beyond arguments and results: 4
        bytes a token
    (the gradient) and 40 bytes a sequence.
    """
    objective = get_objective(objective)
    _check(logprobs, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, objective)
    num_sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    denominator = _denominator(denominator, objective, logprobs, mask, num_sequences)
    if objective.kl_coef == 0:
        ref_logprobs = None
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        return PolicyLoss(
            *reference.policy_loss(
                logprobs.float(), old_logprobs.float(),
                _per_token(advantages.float(), logprobs, cu_seqlens), objective, denominator,
                mask=mask, cu_seqlens=cu_seqlens,
                ref=None if ref_logprobs is None else ref_logprobs.float(),
            )
        )  # fmt: skip
    if cu_seqlens is None and advantages.dim() == 1:
        advantages = advantages[:, None].expand(logprobs.shape)
    elif cu_seqlens is not None and advantages.numel() == num_sequences != logprobs.numel():
        advantages = advantages[:, None].expand(num_sequences, logprobs.numel())
    loss, metrics, _ = _operator(
        as_rows("logprobs", logprobs),
        as_rows("old_logprobs", old_logprobs),
        as_rows("advantages", advantages),
        None if ref_logprobs is None else as_rows("ref_logprobs", ref_logprobs),
        None if mask is None else as_rows("mask", mask),
        cu_seqlens,
        objective.ratio_level == "sequence",
        objective.aggregation == "sequence-mean-token-mean",
        1 - objective.clip_low,
        1 + objective.clip_high,
        0 if ref_logprobs is None else 1 + KL_ESTIMATORS.index(objective.kl_estimator),
        objective.kl_coef,
        objective.log_ratio_limit,
        denominator,
        logprobs.requires_grad and torch.is_grad_enabled(),
        name,
    )
    return PolicyLoss(loss, metrics)


def policy_metrics(metrics: Tensor) -> dict[str, float]:
    """The metrics vector, or the sum of several, as means over tokens. Reads the device once.

    Returns:
        loss/policy, loss/kl: as they enter the loss, before kl_coef. ratio/clip_frac_low,
        ratio/clip_frac_high: share of tokens at which the clipped branch is active at that bound.
        ratio/mean, ratio/min, ratio/max. kl/approx: k3 of old against new policy. kl/ref: the
        estimator against the reference. All 0 without tokens.
    """
    row = dict(zip(METRICS, metrics.tolist(), strict=True))
    tokens = max(row["tokens"], 1.0)
    some = row["tokens"] > 0
    return {
        "loss/policy": row["policy_loss"],
        "loss/kl": row["kl_loss"],
        "ratio/clip_frac_low": row["clipped_low"] / tokens,
        "ratio/clip_frac_high": row["clipped_high"] / tokens,
        "ratio/mean": row["ratio"] / tokens,
        "ratio/min": row["ratio_min"] if some else 0.0,
        "ratio/max": row["ratio_max"] if some else 0.0,
        "kl/approx": row["approx_kl"] / tokens,
        "kl/ref": row["kl"] / tokens,
    }


def sum_metrics(metrics: Sequence[Tensor]) -> Tensor:
    """The metrics vectors of several micro-batches as one: sums, and the extremes of the ratio."""
    stacked = torch.stack(list(metrics))
    total = stacked.sum(0)
    low, high = METRICS.index("ratio_min"), METRICS.index("ratio_max")
    total[low], total[high] = stacked[:, low].amin(), stacked[:, high].amax()
    return total


def _check(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    objective: Objective,
) -> None:
    check_tensor("logprobs", logprobs, FLOATS)
    shape = logprobs.shape
    if cu_seqlens is None:
        if logprobs.dim() != 2:
            raise ValueError(
                f"logprobs must be (B, T), or (N,) together with cu_seqlens, got {tuple(shape)}"
            )
        num_sequences = shape[0]
    else:
        if logprobs.dim() != 1:
            raise ValueError(f"with cu_seqlens logprobs must be (N,), got {tuple(shape)}")
        check_tensor("cu_seqlens", cu_seqlens, (torch.int32,), like=logprobs)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or not cu_seqlens.is_contiguous():
            raise ValueError(f"cu_seqlens must be a dense (B + 1,), got {tuple(cu_seqlens.shape)}")
        num_sequences = cu_seqlens.numel() - 1
    check_tensor("old_logprobs", old_logprobs, FLOATS, shape, logprobs)
    check_tensor("advantages", advantages, FLOATS, like=logprobs)
    if advantages.shape != shape and advantages.shape != (num_sequences,):
        raise ValueError(
            f"advantages must be one a token, {tuple(shape)}, or one a sequence, "
            f"({num_sequences},), got {tuple(advantages.shape)}"
        )
    check_mask("mask", mask, shape, logprobs)
    if objective.kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef = {objective.kl_coef} needs ref_logprobs; or set kl_coef to 0")
    if ref_logprobs is not None:
        check_tensor("ref_logprobs", ref_logprobs, FLOATS, shape, logprobs)
    check_no_grad("old_logprobs", old_logprobs)
    check_no_grad("advantages", advantages)
    check_no_grad("ref_logprobs", ref_logprobs)


def _denominator(
    denominator: float | Tensor | None,
    objective: Objective,
    logprobs: Tensor,
    mask: Tensor | None,
    num_sequences: int,
) -> Tensor:
    if isinstance(denominator, Tensor):
        check_tensor("denominator", denominator, (torch.float32,), (), logprobs)
        return denominator
    if denominator is not None:
        if not denominator >= 0:
            raise ValueError(f"denominator must be >= 0, got {denominator}")
        return logprobs.new_full((), denominator, dtype=torch.float32)
    if objective.aggregation == "sequence-mean-token-sum-norm":
        raise ValueError(
            "aggregation 'sequence-mean-token-sum-norm' needs "
            "denominator = sequences x a constant length"
        )
    if objective.aggregation != "token-mean":
        return logprobs.new_full((), num_sequences, dtype=torch.float32)
    if mask is None:
        return logprobs.new_full((), logprobs.numel(), dtype=torch.float32)
    return mask.sum(dtype=torch.float32)


def _per_token(advantages: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if advantages.shape == logprobs.shape:
        return advantages
    if cu_seqlens is None:
        return advantages[:, None].expand(logprobs.shape)
    return advantages.repeat_interleave(cu_seqlens.diff().long(), output_size=logprobs.numel())


def _forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_level: bool,
    sequence_mean: bool,
    ratio_low: float,
    ratio_high: float,
    kl: int,
    kl_coef: float,
    log_ratio_limit: float,
    denominator: Tensor,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, metrics, gradient = _allocate(logprobs, with_gradient)
    if cu_seqlens is not None:
        gradient.zero_()  # of tokens that belong to no sequence
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    partials = logprobs.new_empty((sequences, len(METRICS)), dtype=torch.float32)
    if cu_seqlens is not None:
        # every sequence sees the one packed row: row stride 0
        rows = (sequences, logprobs.shape[1])
        logprobs, old_logprobs = logprobs.expand(rows), old_logprobs.expand(rows)
        advantages = advantages.expand(rows)
        ref_logprobs = None if ref_logprobs is None else ref_logprobs.expand(rows)
        mask = None if mask is None else mask.expand(rows)
    dispatch.load(backend).policy_loss(
        sequences, logprobs.shape[1], cu_seqlens,
        logprobs, old_logprobs, advantages, ref_logprobs, mask,
        sequence_level, sequence_mean, ratio_low, ratio_high, kl, kl_coef, log_ratio_limit,
        denominator, gradient if with_gradient else None, partials, loss, metrics,
    )  # fmt: skip
    return loss, metrics, gradient


def _allocate(logprobs: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logprobs.new_empty((), dtype=torch.float32),
        logprobs.new_empty((len(METRICS),), dtype=torch.float32),
        logprobs.new_empty(logprobs.shape if with_gradient else (0,), dtype=torch.float32),
    )


def _fake_forward(logprobs, *arguments):
    return _allocate(logprobs, arguments[-2])


def _save(ctx, inputs, output) -> None:
    ctx.dtype, ctx.with_gradient = inputs[0].dtype, inputs[14]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _differentiate(ctx, grad_loss, _grad_metrics, _grad_gradient):
    if grad_loss is None or not ctx.with_gradient:
        return (None,) * 16
    (gradient,) = ctx.saved_tensors
    return ((gradient * grad_loss).to(ctx.dtype), *(None,) * 15)


_operator = Operator("policy_loss", _forward, _fake_forward, _save, _differentiate)
