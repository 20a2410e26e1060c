"""Launches of the Triton kernels of policy_loss_from_logits, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches.logprobs import ALIGNED_VOCAB, ODD_VOCAB
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.logprobs import LogprobsArguments
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments
from warpo.kernels._arguments.policy_loss_from_logits import (
    PolicyLossFromLogitsArguments,
    ScaleGradientArguments,
)

Launch = tuple[str, Callable[[], None]]


def policy_loss_from_logits(
    dtype: torch.dtype,
    vocab: int,
    full: bool,
    surrogate: int = 0,
    tokens: int = 4,
    number: float = 0.7,
    gradient_dtype: torch.dtype | None = None,
) -> None:
    """full: with all optional tensors, correction, KL and entropy bonus."""
    from warpo.kernels import _triton

    logits, row = torch.empty(1, tokens, vocab, dtype=dtype), torch.empty(1, tokens)
    optional, scalar = row if full else None, torch.empty(())
    objective = ObjectiveArguments(
        ratio_level=0,
        surrogate=surrogate,
        ratio_low=1 - number,
        ratio_high=1 + number,
        dual_clip=3.0 + number,
        tau_positive=number,
        tau_negative=number,
        power_positive=number,
        power_negative=number,
        rate_positive=number,
        rate_negative=number,
        correction=2 * full,
        correction_sequence=False,
        correction_low=number,
        correction_high=2.0,
        kl_straight_through=False,
        kl_sequence=False,
        entropy_coef=number * full,
        log_ratio_limit=20 * number,
        sequence_mean=full,
    )
    forward = LogprobsArguments(
        rows=1,
        steps=tokens,
        vocab=vocab,
        logits=logits,
        targets=torch.zeros(1, tokens, dtype=torch.int64),
        temperature=number,
        token_temperature=optional,
        mask=torch.empty(1, tokens, dtype=torch.bool),
        ignore_index=-100,
        logprobs=row,
        entropy=row,
        stats=None,
        partials=None,
    )
    arguments = PolicyLossFromLogitsArguments(
        objective=objective,
        kl_penalty=KlPenaltyArguments(
            kl=3 * full, kl_coef=number, adaptive_kl_coef=scalar if full else None
        ),
        forward=forward,
        sequences=2,
        cu_seqlens=torch.zeros(3, dtype=torch.int32) if full else None,
        old_logprobs=optional,
        advantages=row,
        ref_logprobs=optional,
        sampler_logprobs=optional,
        valid_tokens=optional,
        denominator=DenominatorArguments(0.0, scalar),
        grad_logits=torch.empty_like(logits, dtype=gradient_dtype),
    )
    _triton.policy_loss_from_logits(arguments)
    scale = ScaleGradientArguments(
        rows=1, steps=tokens, vocab=vocab, gradient=logits, factor=scalar
    )
    _triton.scale_gradient(scale)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        for vocab, alignment in ((ALIGNED_VOCAB, "aligned"), (ODD_VOCAB, "odd")):
            for full in (False, True) if all_of_them else (True,):
                label = f"{short} {alignment}{' all' if full else ''}"
                yield label, partial(policy_loss_from_logits, dtype, vocab, full)
    rounding = partial(policy_loss_from_logits, torch.float32, gradient_dtype=torch.bfloat16)
    yield "f32, gradients of bf16", partial(rounding, ALIGNED_VOCAB, True)
    if all_of_them:
        for surrogate in range(1, 8):
            launch = partial(
                policy_loss_from_logits, torch.bfloat16, ALIGNED_VOCAB, True, surrogate
            )
            yield f"surrogate {surrogate}", launch


def variations() -> Iterator[Callable[[], None]]:
    for tokens in (1, 16, 37):
        for vocab in (ALIGNED_VOCAB + 16, 64):
            sizes = {"tokens": tokens, "number": 1 / tokens}
            yield partial(policy_loss_from_logits, torch.bfloat16, vocab, True, **sizes)
        yield partial(policy_loss_from_logits, torch.bfloat16, 101, False, tokens=tokens)
