"""KTO, the loss of completions with a verdict, not of pairs: loss, gradient and metrics in one
pass.

    x       = sum over the tokens of log pi - log ref
    example = desirable_weight (1 - sigmoid(beta (x - kl)))        of a desirable completion
              undesirable_weight (1 - sigmoid(beta (kl - x)))      of another
    loss    = 1 / denominator * sum over examples

Backward: every token of a completion has the gradient of its x. No gradient flows through kl, the
reference point. A completion without valid tokens does not count.

Source: https://arxiv.org/abs/2402.01306 section 4.1.
"""

from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.preference_loss import COMPLETION_SLICES, KtoLossArguments
from warpo.kernels._checks import (
    FLOATS,
    as_rows,
    check_mask,
    check_no_grad,
    check_number,
    check_tensor,
)
from warpo.kernels._offsets import check_values, is_malformed, valid_tokens
from warpo.kernels._preference_loss import CompletionsInputs, completions_arguments
from warpo.kernels._registration import Operator
from warpo.kernels._sequences import (
    as_denominator,
    check_sequences,
    denominator_tensor,
    empty_float32,
    empty_results,
    scaled,
)
from warpo.kernels._symbolic import as_scalar

KTO_METRICS = (
    "loss",
    "desirable",
    "undesirable",
    "desirable_reward",
    "undesirable_reward",
    "desirable_logprob",
    "undesirable_logprob",
)


class KtoLossInputs(NamedTuple):
    logprobs: Tensor
    completions: CompletionsInputs
    desirable: Tensor
    kl: Tensor
    beta: float
    desirable_weight: float
    undesirable_weight: float
    denominator: DenominatorArguments
    with_gradient: bool
    backend: str


class KtoLoss(NamedTuple):
    loss: Tensor
    metrics: Tensor


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> KtoLoss:
    """Loss of completions of which each is desirable or not.

    Args:
        logprobs: one per token, (B, T) padded, or (N,) packed with cu_seqlens. float32 | bfloat16 |
            float16, any strides. Differentiable. Sums over completions, (B,), are sums[:, None].
        ref_logprobs: like logprobs: of the reference. A constant.
        desirable: (B,) bool | uint8.
        kl: the reference point, a number or a float32 scalar tensor: `kto_reference_point`.
        beta: how fast the value of a reward saturates.
        desirable_weight: of the loss of desirable completions.
        undesirable_weight: of the others.
        mask: like logprobs, bool | uint8. Masked slots are never read (they may hold NaN); their
            gradient is 0.
        cu_seqlens: as in `policy_loss`: completion b is logprobs[cu_seqlens[b] :
            cu_seqlens[b + 1]].
        denominator: what the sum over examples is divided by, a number or a scalar tensor:
            examples of the whole optimizer step. Not given: B. 0 gives loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to logprobs.
        metrics: (7,) float32 in the order of KTO_METRICS, on the device: the loss as it is, and
            sums over examples, so that those of micro-batches add up. `kto_metrics` reads it.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: 4 bytes per token (the gradient) and 0.5 KiB per example.
    """
    examples = _check(logprobs, ref_logprobs, mask, cu_seqlens)
    check_mask("desirable", desirable, (examples,), logprobs)
    for option, value in (
        ("beta", beta),
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        check_number(option, value)
        if not value >= 0:
            raise ValueError(f"{option} must be >= 0, got {value}")
    if isinstance(kl, Tensor):
        check_tensor("kl", kl, (torch.float32,), (), logprobs)
        check_no_grad("kl", kl)
    else:
        kl = as_scalar(kl, logprobs)
    scale = as_denominator(examples if denominator is None else denominator, logprobs)
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        check_values("cu_seqlens", cu_seqlens, logprobs.numel())
        loss, metrics = reference.kto_loss(
            logprobs.float(),
            ref_logprobs.float(),
            desirable,
            kl,
            denominator_tensor(scale, logprobs),
            mask=mask,
            cu_seqlens=cu_seqlens,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
        return KtoLoss(loss, metrics)
    completions = CompletionsInputs(
        ref_logprobs=as_rows("ref_logprobs", ref_logprobs),
        mask=None if mask is None else as_rows("mask", mask),
        cu_seqlens=cu_seqlens,
    )
    inputs = KtoLossInputs(
        logprobs=as_rows("logprobs", logprobs),
        completions=completions,
        desirable=desirable,
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        denominator=scale,
        with_gradient=logprobs.requires_grad and torch.is_grad_enabled(),
        backend=name,
    )
    return KtoLoss(*_operator(inputs))


@torch.no_grad()
def kto_reference_point(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The `kl` of `kto_loss`: max(0, mean over completions of the sum over tokens of log pi - log
    ref).

    Args:
        logprobs: as of `kto_loss`, of completions to other prompts: the completion of each
            example after the prompt of the next, say.
        ref_logprobs, mask, cu_seqlens: as of `kto_loss`.

    Returns:
        () float32 on the device. Data-parallel ranks should average it before they use it.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    completions = _check(logprobs, ref_logprobs, mask, cu_seqlens)
    tokens = logprobs.numel()
    checked = not torch.compiler.is_compiling() and check_values("cu_seqlens", cu_seqlens, tokens)
    ratio = logprobs.float() - ref_logprobs.float()
    valid = valid_tokens(mask, cu_seqlens, tokens)
    if valid is not None:
        ratio = torch.where(valid != 0, ratio, 0)
    point = (ratio.sum() / max(completions, 1)).clamp(min=0)
    if cu_seqlens is None or checked:
        return point
    return torch.where(is_malformed(cu_seqlens, tokens), torch.nan, point)


def kto_metrics(metrics: Tensor) -> dict[str, float]:
    """The metrics vector, or the sum of several, as means. Reads the device once.

    Returns:
        loss/kto. reward/desirable, reward/undesirable: beta x. reward/margin: their difference, 0
            where there is only one kind. logprob/desirable, logprob/undesirable: of whole
            completions. 0 where there are none.
    """
    row = dict(zip(KTO_METRICS, metrics.tolist(), strict=True))
    good, bad = max(row["desirable"], 1.0), max(row["undesirable"], 1.0)
    desirable, undesirable = row["desirable_reward"] / good, row["undesirable_reward"] / bad
    both = row["desirable"] > 0 and row["undesirable"] > 0
    return {
        "loss/kto": row["loss"],
        "reward/desirable": desirable,
        "reward/undesirable": undesirable,
        "reward/margin": desirable - undesirable if both else 0.0,
        "logprob/desirable": row["desirable_logprob"] / good,
        "logprob/undesirable": row["undesirable_logprob"] / bad,
    }


def _check(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> int:
    check_tensor("logprobs", logprobs, FLOATS)
    completions = check_sequences("logprobs", logprobs, cu_seqlens)
    check_tensor("ref_logprobs", ref_logprobs, FLOATS, logprobs.shape, logprobs)
    check_no_grad("ref_logprobs", ref_logprobs)
    check_mask("mask", mask, logprobs.shape, logprobs)
    return completions


def _forward(inputs: KtoLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, examples = inputs.logprobs, inputs.desirable.shape[0]
    check_values("cu_seqlens", inputs.completions.cu_seqlens, logprobs.shape[1])
    loss, metrics, gradient = _allocate(inputs)
    arguments = KtoLossArguments(
        examples=examples,
        completions=completions_arguments(
            logprobs, inputs.completions, gradient, inputs.with_gradient
        ),
        desirable=inputs.desirable,
        kl=inputs.kl,
        beta=inputs.beta,
        desirable_weight=inputs.desirable_weight,
        undesirable_weight=inputs.undesirable_weight,
        denominator=inputs.denominator,
        partials=metrics.new_empty(examples, len(KTO_METRICS) + 4 * COMPLETION_SLICES),
        loss=loss,
        metrics=metrics,
    )
    dispatch.load(inputs.backend).kto_loss(arguments)
    return loss, metrics, gradient


def _allocate(inputs: KtoLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    loss, metrics = empty_results(inputs.denominator, inputs.logprobs, len(KTO_METRICS))
    return (
        loss,
        metrics,
        empty_float32(inputs.logprobs) if inputs.with_gradient else metrics.new_empty(0),
    )


def _save(ctx: Any, inputs: KtoLossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.with_gradient = inputs.logprobs.dtype, inputs.with_gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object, scale: Any = mul) -> Any:
    if grad_loss is None or not ctx.with_gradient:
        return (None,)
    (gradient,) = ctx.saved_tensors
    return (scale(gradient, grad_loss).to(ctx.dtype),)


_operator = Operator(
    "kto_loss",
    _forward,
    _allocate,
    _save,
    _differentiate,
    differentiable=1,
    differentiate_eager=partial(_differentiate, scale=scaled),
    returned=2,
)
