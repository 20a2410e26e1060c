"""One number from the per-token values of a batch of sequences, as the losses make it.

    "token-mean"                    sum_b sum_t m_bt x_bt / tokens
    "sequence-mean-token-mean"      sum_b (sum_t m_bt x_bt / tokens_b) / sequences
    "sequence-mean-token-sum"       sum_b sum_t m_bt x_bt / sequences
    "sequence-mean-token-sum-norm"  sum_b sum_t m_bt x_bt / denominator

with m_bt the mask, 1 where valid and else 0, or the weight of the token; tokens = sum_b tokens_b,
tokens_b = sum_t m_bt; and another denominator in the place of the count where one is given.
Backward: d / d x_bt = m_bt w_b, with w_b = 1 / denominator, or 1 / (tokens_b x denominator) for
"sequence-mean-token-mean".

Sources: mean of each completion, https://arxiv.org/abs/2402.03300 eq. 3; of all tokens,
https://arxiv.org/abs/2503.14476 eq. 8; a constant length, https://arxiv.org/abs/2503.20783
section 3.2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.aggregate import (
    MIN_PARTS,
    AggregateArguments,
    AggregateBackwardArguments,
)
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._checks import FLOATS, check_mask, check_no_grad, check_tensor
from warpo.kernels._offsets import check_values
from warpo.kernels._registration import Operator
from warpo.kernels._sequences import (
    as_denominator,
    check_aggregation,
    check_sequences,
    denominator_tensor,
)
from warpo.kernels.objectives import AGGREGATIONS

_CODES = {name: code for code, name in enumerate(AGGREGATIONS)}


class AggregateInputs(NamedTuple):
    values: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    aggregation: int
    denominator: DenominatorArguments
    backend: str


def aggregate(
    values: Tensor,
    aggregation: str = "token-mean",
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean or scaled sum of the valid tokens of a batch: of a loss, an entropy, a KL.

    Args:
        values: (B, T) padded, or (N,) packed with cu_seqlens. float32 | bfloat16 | float16, any
            strides. Differentiable.
        aggregation: as in `Objective`: "token-mean" | "sequence-mean-token-mean" |
            "sequence-mean-token-sum" | "sequence-mean-token-sum-norm".
        mask: like values, bool | uint8, or float32 weights >= 0, a constant. Slots that are masked
            or of weight 0 are never read (they may hold NaN); their gradient is 0. A weight that is
            negative or NaN makes the result NaN.
        cu_seqlens: as in `policy_loss`: sequence b is values[cu_seqlens[b] : cu_seqlens[b + 1]].
        denominator: what the aggregation divides by, a number or a scalar tensor: for
            gradients that do not depend on the split into micro-batches, the count of the whole
            optimizer step. A constant. Not given: the sum of the mask in this call for
            "token-mean", its sequences for the others; "...-norm" has no default. 0 gives 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        () float32, differentiable with respect to values.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: 12 bytes per sequence and at least 4 KiB.
    """
    check_tensor("values", values, FLOATS)
    check_sequences("values", values, cu_seqlens)
    _check_weights(mask, values)
    check_aggregation(aggregation, denominator)
    scale = DenominatorArguments(-1.0, None)
    if denominator is not None:
        scale = as_denominator(denominator, values)
    name = dispatch.choose(values, backend)
    if name == "reference":
        check_values("cu_seqlens", cu_seqlens, values.numel())
        return reference.aggregate(
            values.float(),
            aggregation,
            mask=mask,
            cu_seqlens=cu_seqlens,
            denominator=None if denominator is None else denominator_tensor(scale, values),
        )
    inputs = AggregateInputs(
        values=values,
        mask=mask,
        cu_seqlens=cu_seqlens,
        aggregation=_CODES[aggregation],
        denominator=scale,
        backend=name,
    )
    return _operator(inputs)


def _check_weights(mask: Tensor | None, values: Tensor) -> None:
    if isinstance(mask, Tensor) and mask.is_floating_point():
        if mask.dtype != torch.float32:
            dtype = str(mask.dtype).removeprefix("torch.")
            raise ValueError(f"mask as weights must be float32, got {dtype}: pass mask.float()")
        check_tensor("mask", mask, (torch.float32,), values.shape, values)
        check_no_grad("mask", mask)
    else:
        check_mask("mask", mask, values.shape, values)


def _sequences(shape: Sequence[int], cu_seqlens: Tensor | None) -> int:
    return shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


class _BackwardInputs(NamedTuple):
    weights: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    grad: Tensor
    shape: Sequence[int]
    dtype: torch.dtype
    backend: str


def _forward(inputs: AggregateInputs) -> tuple[Tensor, Tensor]:
    """The result, and the weight of a valid token of each sequence, with the workspace behind."""
    values, cu_seqlens = inputs.values, inputs.cu_seqlens
    check_values("cu_seqlens", cu_seqlens, values.shape[-1])
    result, weights = _allocate(inputs)
    arguments = AggregateArguments(
        sequences=_sequences(values.shape, cu_seqlens),
        steps=values.shape[-1],
        cu_seqlens=cu_seqlens,
        values=values,
        mask=inputs.mask,
        aggregation=inputs.aggregation,
        denominator=inputs.denominator,
        weights=weights,
        result=result,
    )
    dispatch.load(inputs.backend).aggregate_forward(arguments)
    return result, weights


def _allocate(inputs: AggregateInputs) -> tuple[Tensor, Tensor]:
    values = inputs.values
    sequences = _sequences(values.shape, inputs.cu_seqlens)
    return (
        values.new_empty((), dtype=torch.float32),
        values.new_empty(sequences + 2 * max(sequences, MIN_PARTS), dtype=torch.float32),
    )


def _backward(inputs: _BackwardInputs) -> Tensor:
    steps, cu_seqlens = inputs.shape[-1], inputs.cu_seqlens
    check_values("cu_seqlens", cu_seqlens, steps)
    sequences = _sequences(inputs.shape, cu_seqlens)
    grad_values = _allocate_gradient(inputs)
    if sequences == 0:
        return grad_values.zero_()
    arguments = AggregateBackwardArguments(
        sequences=sequences,
        steps=steps,
        cu_seqlens=cu_seqlens,
        mask=inputs.mask,
        weights=inputs.weights,
        grad=inputs.grad,
        grad_values=grad_values,
    )
    dispatch.load(inputs.backend).aggregate_backward(arguments)
    return grad_values


def _allocate_gradient(inputs: _BackwardInputs) -> Tensor:
    return inputs.weights.new_empty(inputs.shape, dtype=inputs.dtype)


_backward_operator = Operator("aggregate_backward", _backward, _allocate_gradient)


def _save(ctx: Any, inputs: AggregateInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.shape, ctx.dtype, ctx.backend = inputs.values.shape, inputs.values.dtype, inputs.backend
    ctx.save_for_backward(inputs.mask, inputs.cu_seqlens, output[1])


def _differentiate(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor]:
    mask, cu_seqlens, weights = ctx.saved_tensors
    inputs = _BackwardInputs(
        weights=weights,
        mask=mask,
        cu_seqlens=cu_seqlens,
        grad=grad,
        shape=ctx.shape,
        dtype=ctx.dtype,
        backend=ctx.backend,
    )
    return (_backward_operator(inputs),)


_operator = Operator(
    "aggregate", _forward, _allocate, _save, _differentiate, differentiable=1, returned=1
)
