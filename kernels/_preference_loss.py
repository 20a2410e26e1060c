"""Losses of pairs of completions (the DPO family): loss, gradient and metrics in one pass.

    x      = sum over the tokens of log pi - log ref, or what `Preference` says instead
    d      = x_chosen - x_rejected
    pair   = -log sigmoid(beta d - margin) | max(0, margin - beta d) | (d - 1 / (2 beta))^2
             + nll_coef * mean over the tokens of -log pi(chosen)
    loss   = 1 / denominator * sum over pairs

Backward: every token of a completion has the same gradient, that of its x, over the number of
tokens where x is a mean. A pair of which a completion has no valid token does not count.

Sources: at the rows of `preferences.PREFERENCES`; DPO, https://arxiv.org/abs/2305.18290 eq. 7.
"""

from dataclasses import asdict
from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.preference_loss import (
    COMPLETION_SLICES,
    CompletionsArguments,
    PreferenceLossArguments,
)
from warpo.kernels._checks import FLOATS, as_rows, check_mask, check_no_grad, check_tensor
from warpo.kernels._offsets import check_values
from warpo.kernels._registration import Operator
from warpo.kernels._sequences import (
    as_denominator,
    check_sequences,
    denominator_tensor,
    empty_float32,
    empty_results,
    scaled,
    spread_packed,
)
from warpo.kernels.preferences import LINKS, Preference, get_preference

PREFERENCE_METRICS = (
    "loss",
    "pairs",
    "correct",
    "chosen_reward",
    "rejected_reward",
    "chosen_logprob",
    "rejected_logprob",
    "chosen_nll",
)


class CompletionsInputs(NamedTuple):
    """What the completions of one side have beside their logprobs."""

    ref_logprobs: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None


class PreferenceLossInputs(NamedTuple):
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen: CompletionsInputs
    rejected: CompletionsInputs
    link: int
    length_normalise: bool
    odds: bool
    beta: float
    margin: float
    positive_weight: float
    negative_weight: float
    nll_coef: float
    denominator: DenominatorArguments
    with_gradient: bool
    backend: str


class PreferenceLoss(NamedTuple):
    loss: Tensor
    metrics: Tensor


def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    loss: str | Preference = "dpo",
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PreferenceLoss:
    """Loss of pairs of completions under a row of `preferences.PREFERENCES`, or one of your own.

    Args:
        chosen_logprobs: one per token, (B, T) padded, or (N,) packed with chosen_cu_seqlens.
            float32 | bfloat16 | float16, any strides. Differentiable. Sums over completions, (B,),
            are sums[:, None]. Of a forward pass over chosen and rejected completions together, pass
            logprobs[:B] and logprobs[B:]; packed, all logprobs twice with cu_seqlens[: B + 1] and
            cu_seqlens[B:].
        rejected_logprobs: the same of the rejected completions; its T is its own. Differentiable.
        ref_chosen_logprobs: like chosen_logprobs: of the reference. Required where the loss has a
            reference, not read where it has none. A constant.
        ref_rejected_logprobs: like rejected_logprobs: of the reference.
        loss: name of a row ("dpo", "simpo", ...) or a `Preference`.
        chosen_mask: like chosen_logprobs, bool | uint8: the tokens of the completion.
            Masked slots are never read (they may hold NaN); their gradient is 0.
        rejected_mask: like rejected_logprobs.
        chosen_cu_seqlens: as in `policy_loss`: completion b is its tokens
            chosen_cu_seqlens[b : b + 2].
        rejected_cu_seqlens: the same of the rejected completions.
        denominator: what the sum over pairs is divided by, a number or a scalar tensor:
            pairs of the whole optimizer step, for gradients that do not depend on micro-batches.
            Not given: B. 0 gives loss 0.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to both logprobs.
        metrics: (8,) float32 in the order of PREFERENCE_METRICS, on the device: the loss as it is,
            and sums over pairs, so that those of micro-batches add up. `preference_metrics` reads
            it.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: 4 bytes per token (the gradients) and 1 KiB per pair.
    """
    row = get_preference(loss)
    chosen = (chosen_logprobs, ref_chosen_logprobs, chosen_mask, chosen_cu_seqlens)
    rejected = (rejected_logprobs, ref_rejected_logprobs, rejected_mask, rejected_cu_seqlens)
    pairs = _check_side("chosen", *chosen, row.reference)
    others = _check_side("rejected", *rejected, row.reference)
    if pairs != others:
        raise ValueError(f"chosen_logprobs has {pairs} completions, rejected_logprobs {others}")
    if chosen_logprobs.device != rejected_logprobs.device:
        raise ValueError(
            f"rejected_logprobs is on {rejected_logprobs.device}, "
            f"chosen_logprobs on {chosen_logprobs.device}: move it"
        )
    scale = as_denominator(pairs if denominator is None else denominator, chosen_logprobs)
    if not row.reference:
        ref_chosen_logprobs = ref_rejected_logprobs = None
    name = dispatch.choose(chosen_logprobs, backend)
    if name == "reference":
        check_values("chosen_cu_seqlens", chosen_cu_seqlens, chosen_logprobs.numel())
        check_values("rejected_cu_seqlens", rejected_cu_seqlens, rejected_logprobs.numel())
        result, metrics = reference.preference_loss(
            chosen_logprobs.float(),
            rejected_logprobs.float(),
            _as_float(ref_chosen_logprobs),
            _as_float(ref_rejected_logprobs),
            denominator_tensor(scale, chosen_logprobs),
            chosen_mask=chosen_mask,
            rejected_mask=rejected_mask,
            chosen_cu_seqlens=chosen_cu_seqlens,
            rejected_cu_seqlens=rejected_cu_seqlens,
            **asdict(row),
        )
        return PreferenceLoss(result, metrics)
    positive, negative = _label_weights(row)
    with_gradient = torch.is_grad_enabled() and (
        chosen_logprobs.requires_grad or rejected_logprobs.requires_grad
    )
    inputs = PreferenceLossInputs(
        chosen_logprobs=as_rows("chosen_logprobs", chosen_logprobs),
        rejected_logprobs=as_rows("rejected_logprobs", rejected_logprobs),
        chosen=_as_rows("chosen", ref_chosen_logprobs, chosen_mask, chosen_cu_seqlens),
        rejected=_as_rows("rejected", ref_rejected_logprobs, rejected_mask, rejected_cu_seqlens),
        link=LINKS.index(row.link),
        length_normalise=row.length_normalise,
        odds=row.odds,
        beta=row.beta,
        margin=1 / (2 * row.beta) if row.link == "square" else row.margin,
        positive_weight=positive,
        negative_weight=negative,
        nll_coef=row.nll_coef,
        denominator=scale,
        with_gradient=with_gradient,
        backend=name,
    )
    return PreferenceLoss(*_operator(inputs))


def preference_metrics(metrics: Tensor) -> dict[str, float]:
    """The metrics vector, or the sum of several, as means over pairs. Reads the device once.

    Returns:
        loss/preference. preference/accuracy: share of pairs whose chosen completion has the larger
            reward. reward/chosen, reward/rejected: beta x. reward/margin: their difference.
            logprob/chosen, logprob/rejected: of whole completions. nll/chosen: per token. All 0
            without pairs.
    """
    row = dict(zip(PREFERENCE_METRICS, metrics.tolist(), strict=True))
    pairs = max(row["pairs"], 1.0)
    return {
        "loss/preference": row["loss"],
        "preference/accuracy": row["correct"] / pairs,
        "reward/chosen": row["chosen_reward"] / pairs,
        "reward/rejected": row["rejected_reward"] / pairs,
        "reward/margin": (row["chosen_reward"] - row["rejected_reward"]) / pairs,
        "logprob/chosen": row["chosen_logprob"] / pairs,
        "logprob/rejected": row["rejected_logprob"] / pairs,
        "nll/chosen": row["chosen_nll"] / pairs,
    }


def _check_side(
    side: str,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    needs_reference: bool,
) -> int:
    name = f"{side}_logprobs"
    check_tensor(name, logprobs, FLOATS)
    completions = check_sequences(name, logprobs, cu_seqlens, f"{side}_cu_seqlens")
    if ref_logprobs is not None:
        check_tensor(f"ref_{name}", ref_logprobs, FLOATS, logprobs.shape, logprobs)
        check_no_grad(f"ref_{name}", ref_logprobs)
    elif needs_reference:
        raise ValueError(f"this loss needs ref_{name}; or a row with reference=False")
    check_mask(f"{side}_mask", mask, logprobs.shape, logprobs)
    return completions


def _label_weights(row: Preference) -> tuple[float, float]:
    """Weights of -log sigmoid(z) and -log sigmoid(-z)."""
    flipped = -row.label_smoothing if row.robust else row.label_smoothing
    scale = 1 / (1 - 2 * row.label_smoothing) if row.robust else 1.0
    if row.odds:
        scale *= row.beta
    return scale * (1 - row.label_smoothing), scale * flipped


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _as_rows(
    side: str, ref_logprobs: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> CompletionsInputs:
    return CompletionsInputs(
        ref_logprobs=None
        if ref_logprobs is None
        else as_rows(f"ref_{side}_logprobs", ref_logprobs),
        mask=None if mask is None else as_rows(f"{side}_mask", mask),
        cu_seqlens=cu_seqlens,
    )


def _forward(inputs: PreferenceLossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected = inputs.chosen_logprobs, inputs.rejected_logprobs
    starts = inputs.chosen.cu_seqlens
    check_values("chosen_cu_seqlens", starts, chosen.shape[1])
    check_values("rejected_cu_seqlens", inputs.rejected.cu_seqlens, rejected.shape[1])
    results = _allocate(inputs)
    loss, metrics, grad_chosen, grad_rejected = results
    pairs = chosen.shape[0] if starts is None else starts.numel() - 1
    arguments = PreferenceLossArguments(
        pairs=pairs,
        chosen=completions_arguments(chosen, inputs.chosen, grad_chosen, inputs.with_gradient),
        rejected=completions_arguments(
            rejected, inputs.rejected, grad_rejected, inputs.with_gradient
        ),
        link=inputs.link,
        length_normalise=inputs.length_normalise,
        odds=inputs.odds,
        beta=inputs.beta,
        margin=inputs.margin,
        positive_weight=inputs.positive_weight,
        negative_weight=inputs.negative_weight,
        nll_coef=inputs.nll_coef,
        denominator=inputs.denominator,
        partials=metrics.new_empty(pairs, len(PREFERENCE_METRICS) + 2 * 4 * COMPLETION_SLICES),
        loss=loss,
        metrics=metrics,
    )
    dispatch.load(inputs.backend).preference_loss(arguments)
    return results


def completions_arguments(
    logprobs: Tensor, completions: CompletionsInputs, gradient: Tensor, with_gradient: bool
) -> CompletionsArguments:
    ref_logprobs, mask, cu_seqlens = completions
    if cu_seqlens is not None:
        gradient.zero_()  # of tokens that belong to no completion
        count = cu_seqlens.numel() - 1
        logprobs, ref_logprobs, mask = spread_packed(
            count, cu_seqlens, logprobs, ref_logprobs, mask
        )
    return CompletionsArguments(
        steps=logprobs.shape[1],
        cu_seqlens=cu_seqlens,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        grad_logprobs=gradient if with_gradient else None,
    )


def _allocate(inputs: PreferenceLossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, metrics = empty_results(
        inputs.denominator, inputs.chosen_logprobs, len(PREFERENCE_METRICS)
    )
    return (
        loss,
        metrics,
        empty_float32(inputs.chosen_logprobs) if inputs.with_gradient else metrics.new_empty(0),
        empty_float32(inputs.rejected_logprobs) if inputs.with_gradient else metrics.new_empty(0),
    )


def _save(ctx: Any, inputs: PreferenceLossInputs, output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = (inputs.chosen_logprobs.dtype, inputs.rejected_logprobs.dtype)
    ctx.with_gradient = inputs.with_gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object, scale: Any = mul) -> Any:
    if grad_loss is None or not ctx.with_gradient:
        return (None, None)
    return tuple(
        scale(gradient, grad_loss).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )


_operator = Operator(
    "preference_loss",
    _forward,
    _allocate,
    _save,
    _differentiate,
    differentiable=2,
    differentiate_eager=partial(_differentiate, scale=scaled),
    returned=2,
)
