"""The clipped value loss: loss, gradient and metrics of all tokens in one pass.

    u_t    = f(v_t - R_t)        f(x) = x^2 / 2, or Huber's: delta (|x| - delta / 2) for |x| > delta
    c_t    = f(clip(v_t, old_t - clip_range, old_t + clip_range) - R_t)
    loss_t = max(u_t, c_t)
    loss   = sum of w_t loss_t,   w_t = 1 / denominator, or 1 / (tokens of the sequence x
    denominator)

Backward: d loss / d v_t = w_t f'(v_t - R_t) within the clip range, its bounds included, and where
u_t is larger; 0 where c_t is larger; half of it on a tie outside, as torch.max has it.

Sources: PPO2's value clipping, https://arxiv.org/abs/2005.12729 section 3; the trust region of
values that it stands for, https://arxiv.org/abs/1506.02438 section 5.
"""

import math
from collections.abc import Sequence
from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.value_loss import MIN_VALUE_PARTIALS, ValueLossArguments
from warpo.kernels._checks import (
    FLOATS,
    as_rows,
    check_mask,
    check_no_grad,
    check_number,
    check_tensor,
)
from warpo.kernels._offsets import check_values
from warpo.kernels._registration import Operator
from warpo.kernels._sequences import (
    check_sequences,
    count_denominator,
    denominator_tensor,
    empty_float32,
    empty_results,
    merge_moments,
    scaled,
    spread_packed,
)

VALUE_METRICS = (
    "loss",
    "tokens",
    "clipped",
    "return_mean",
    "return_m2",
    "error_mean",
    "error_m2",
)
VALUE_LOSSES = ("mse", "huber")


class ValueLossInputs(NamedTuple):
    values: Tensor
    old_values: Tensor | None
    returns: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    sequence_mean: bool
    clip_range: float
    huber_delta: float
    denominator: DenominatorArguments
    with_gradient: bool
    backend: str


class ValueLoss(NamedTuple):
    loss: Tensor
    metrics: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_range: float | None = 0.2,
    loss: str = "mse",
    huber_delta: float = 1.0,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> ValueLoss:
    """Loss of the critic on the returns of a batch of sequences.

    Args:
        values: (B, T) padded, or (N,) packed with cu_seqlens. float32 | bfloat16 | float16, any
            strides. Differentiable.
        old_values: like values: of the critic when the step began. A constant. May be None, and is
            not read, where clip_range is None.
        returns: like values: what the values should be. A constant.
        mask: like values, bool | uint8. Masked slots are never read (they may hold NaN); their
            gradient is 0.
        cu_seqlens: as in `policy_loss`: sequence b is values[cu_seqlens[b] : cu_seqlens[b + 1]].
        clip_range: how far from old_values a value may move to lower the loss; None: anywhere.
        loss: "mse" (squared error / 2) | "huber".
        huber_delta: with "huber" only: larger errors count linearly.
        aggregation: as in `Objective`: "token-mean" | "sequence-mean-token-mean" |
            "sequence-mean-token-sum" | "sequence-mean-token-sum-norm".
        denominator: what the aggregation divides by, a number or a scalar tensor: for
            gradients that do not depend on the split into micro-batches, the count of the whole
            optimizer step. Not given: the count in this call; "...-norm" has no default. 0 gives
            loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to values. The gradient is computed with it.
        metrics: (7,) float32 in the order of VALUE_METRICS, on the device. `value_metrics` reads
            it; `merge_value_metrics` makes one of those of several micro-batches.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: 4 bytes per token (the gradient) and 28 bytes per sequence,
    14 KiB at least.
    """
    sequences = _check(values, old_values, returns, mask, cu_seqlens, clip_range)
    delta = _delta(loss, huber_delta)
    scale = count_denominator(denominator, aggregation, values, mask, cu_seqlens, sequences)
    if clip_range is None:
        old_values = None
    sequence_mean = aggregation == "sequence-mean-token-mean"
    name = dispatch.choose(values, backend)
    if name == "reference":
        check_values("cu_seqlens", cu_seqlens, values.numel())
        result, metrics = reference.value_loss(
            values.float(),
            None if old_values is None else old_values.float(),
            returns.float(),
            denominator_tensor(scale, values),
            mask=mask,
            cu_seqlens=cu_seqlens,
            clip_range=clip_range,
            huber_delta=delta,
            sequence_mean=sequence_mean,
        )
        return ValueLoss(result, metrics)
    inputs = ValueLossInputs(
        values=as_rows("values", values),
        old_values=None if old_values is None else as_rows("old_values", old_values),
        returns=as_rows("returns", returns),
        mask=None if mask is None else as_rows("mask", mask),
        cu_seqlens=cu_seqlens,
        sequence_mean=sequence_mean,
        clip_range=math.inf if clip_range is None else clip_range,
        huber_delta=delta,
        denominator=scale,
        with_gradient=values.requires_grad and torch.is_grad_enabled(),
        backend=name,
    )
    return ValueLoss(*_operator(inputs))


def value_metrics(metrics: Tensor) -> dict[str, float]:
    """The metrics vector, read from the device once.

    Returns:
        loss/value. value/clip_frac: share of tokens at which the clipped branch is the larger one.
            value/explained_variance: 1 - Var(R - v) / Var(R), 0 where all returns are equal.
            value/mean, return/mean. All 0 without tokens.
    """
    row = dict(zip(VALUE_METRICS, metrics.tolist(), strict=True))
    varies = row["return_m2"] > 0
    return {
        "loss/value": row["loss"],
        "value/clip_frac": row["clipped"] / max(row["tokens"], 1.0),
        "value/explained_variance": 1 - row["error_m2"] / row["return_m2"] if varies else 0.0,
        "value/mean": row["return_mean"] - row["error_mean"],
        "return/mean": row["return_mean"],
    }


def merge_value_metrics(metrics: Sequence[Tensor]) -> Tensor:
    """The metrics vectors of several micro-batches as one."""
    return merge_moments(metrics, VALUE_METRICS.index("tokens"), VALUE_METRICS.index("return_mean"))


def _check(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_range: float | None,
) -> int:
    check_tensor("values", values, FLOATS)
    sequences = check_sequences("values", values, cu_seqlens)
    if clip_range is not None:
        check_number("clip_range", clip_range)
        if not clip_range >= 0:
            raise ValueError(f"clip_range must be >= 0, or None, got {clip_range}")
        if old_values is None:
            raise ValueError(f"clip_range = {clip_range} needs old_values; or set it to None")
    if old_values is not None:
        check_tensor("old_values", old_values, FLOATS, values.shape, values)
        check_no_grad("old_values", old_values)
    check_tensor("returns", returns, FLOATS, values.shape, values)
    check_no_grad("returns", returns)
    check_mask("mask", mask, values.shape, values)
    return sequences


def _delta(loss: str, huber_delta: float) -> float:
    """Where the loss becomes linear; never for "mse"."""
    if loss not in VALUE_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(VALUE_LOSSES)}; got {loss!r}")
    check_number("huber_delta", huber_delta)
    if not huber_delta > 0:
        raise ValueError(f"huber_delta must be > 0, got {huber_delta}")
    return math.inf if loss == "mse" else huber_delta


def _forward(inputs: ValueLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    values, cu_seqlens = inputs.values, inputs.cu_seqlens
    check_values("cu_seqlens", cu_seqlens, values.shape[1])
    loss, metrics, gradient = _allocate(inputs)
    if cu_seqlens is not None:
        gradient.zero_()  # of tokens that belong to no sequence
    sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    values, old_values, returns, mask = spread_packed(
        sequences, cu_seqlens, values, inputs.old_values, inputs.returns, inputs.mask
    )
    arguments = ValueLossArguments(
        sequences=sequences,
        steps=values.shape[1],
        cu_seqlens=cu_seqlens,
        values=values,
        old_values=old_values,
        returns=returns,
        mask=mask,
        sequence_mean=inputs.sequence_mean,
        clip_range=inputs.clip_range,
        huber_delta=inputs.huber_delta,
        denominator=inputs.denominator,
        grad_values=gradient if inputs.with_gradient else None,
        partials=metrics.new_empty(max(sequences, MIN_VALUE_PARTIALS), len(VALUE_METRICS)),
        loss=loss,
        metrics=metrics,
    )
    dispatch.load(inputs.backend).value_loss(arguments)
    return loss, metrics, gradient


def _allocate(inputs: ValueLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    loss, metrics = empty_results(inputs.denominator, inputs.values, len(VALUE_METRICS))
    return (
        loss,
        metrics,
        empty_float32(inputs.values) if inputs.with_gradient else metrics.new_empty(0),
    )


def _save(ctx: Any, inputs: ValueLossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.with_gradient = inputs.values.dtype, inputs.with_gradient
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object, scale: Any = mul) -> Any:
    if grad_loss is None or not ctx.with_gradient:
        return (None,)
    (gradient,) = ctx.saved_tensors
    return (scale(gradient, grad_loss).to(ctx.dtype),)


_operator = Operator(
    "value_loss",
    _forward,
    _allocate,
    _save,
    _differentiate,
    differentiable=1,
    differentiate_eager=partial(_differentiate, scale=scaled),
    returned=2,
)
