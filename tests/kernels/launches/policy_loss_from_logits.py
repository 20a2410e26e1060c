"""Launches of the Triton kernels of policy_loss_from_logits, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches.logprobs import ALIGNED_VOCAB, ODD_VOCAB

Launch = tuple[str, Callable[[], None]]


def policy_loss_from_logits(
    dtype: torch.dtype, vocab: int, full: bool, surrogate: int = 0, tokens: int = 4,
    number: float = 0.7,
) -> None:  # fmt: skip
    """full: with all optional tensors, correction, KL and entropy bonus."""
    from warpo.kernels import _triton

    logits, row = torch.empty(1, tokens, vocab, dtype=dtype), torch.empty(1, tokens)
    optional = row if full else None
    flags = torch.empty(1, tokens, dtype=torch.bool)
    starts = torch.zeros(3, dtype=torch.int32) if full else None
    scalar = torch.empty(())
    _triton.policy_loss_from_logits(
        1, tokens, vocab, logits, torch.zeros(1, tokens, dtype=torch.int64), number, optional,
        flags, -100, row, row, None, None, 2, starts, optional, row, optional, optional, optional,
        surrogate, 1 - number, 1 + number, 3.0 + number, number, number, 2 * full, number, 2.0,
        3 * full, False, number, scalar if full else None, number * full, 20 * number, scalar,
        torch.empty_like(logits),
    )  # fmt: skip
    _triton.scale_gradient(1, tokens, vocab, logits, scalar)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        for vocab, alignment in ((ALIGNED_VOCAB, "aligned"), (ODD_VOCAB, "odd")):
            for full in (False, True) if all_of_them else (True,):
                label = f"{short} {alignment}{' all' if full else ''}"
                yield label, partial(policy_loss_from_logits, dtype, vocab, full)
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
