"""Launches of the Triton kernels of preference_loss and kto_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.preference_loss import (
    COMPLETION_SLICES,
    CompletionsArguments,
    KtoLossArguments,
    PreferenceLossArguments,
)
from warpo.kernels._kto_loss import KTO_METRICS
from warpo.kernels._preference_loss import PREFERENCE_METRICS

Launch = tuple[str, Callable[[], None]]


def _completions(
    dtype: torch.dtype, packed: bool, ref: bool, mask: bool, rows: int, steps: int
) -> CompletionsArguments:
    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    return CompletionsArguments(
        steps=steps,
        cu_seqlens=torch.zeros(rows + 1, dtype=torch.int32) if packed else None,
        logprobs=token,
        ref_logprobs=token if ref else None,
        mask=flags(token, mask),
        grad_logprobs=torch.empty(rows, steps),
    )


def preference_loss(
    dtype: torch.dtype,
    packed: bool,
    ref: bool,
    mask: bool,
    link: int,
    odds: bool = False,
    rows: int = 4,
    steps: int = 100,
    beta: float = 0.1,
) -> None:
    from warpo.kernels import _triton

    completions, scalar = _completions(dtype, packed, ref, mask, rows, steps), torch.empty(())
    arguments = PreferenceLossArguments(
        pairs=rows,
        chosen=completions,
        rejected=completions,
        link=link,
        length_normalise=odds,
        odds=odds,
        beta=beta,
        margin=2 * beta,
        positive_weight=1 - beta,
        negative_weight=beta,
        nll_coef=0.0,
        denominator=DenominatorArguments(0.0, scalar),
        partials=torch.empty(rows, len(PREFERENCE_METRICS) + 2 * 4 * COMPLETION_SLICES),
        loss=scalar,
        metrics=torch.empty(len(PREFERENCE_METRICS)),
    )
    _triton.preference_loss(arguments)


def kto_loss(dtype: torch.dtype, packed: bool, mask: bool, rows: int = 4, steps: int = 100) -> None:
    from warpo.kernels import _triton

    scalar = torch.empty(())
    arguments = KtoLossArguments(
        examples=rows,
        completions=_completions(dtype, packed, True, mask, rows, steps),
        desirable=torch.ones(rows, dtype=torch.bool),
        kl=scalar,
        beta=1 / rows,
        desirable_weight=1.0,
        undesirable_weight=1 / steps,
        denominator=DenominatorArguments(0.0, scalar),
        partials=torch.empty(rows, len(KTO_METRICS) + 4 * COMPLETION_SLICES),
        loss=scalar,
        metrics=torch.empty(len(KTO_METRICS)),
    )
    _triton.kto_loss(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "odds mask", partial(preference_loss, torch.bfloat16, False, False, True, 0, True)
    yield "mask", partial(kto_loss, torch.bfloat16, False, True)
    if all_of_them:
        for link in range(3):
            label = f"packed link {link}"
            yield label, partial(preference_loss, torch.float32, True, True, False, link)
        yield "packed", partial(kto_loss, torch.float32, True, False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        for link in range(3):
            sizes = {"rows": rows, "steps": steps, "beta": 1 / rows}
            yield partial(preference_loss, torch.float32, True, True, False, link, **sizes)
        yield partial(kto_loss, torch.bfloat16, False, True, rows, steps)
