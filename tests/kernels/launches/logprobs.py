"""Launches of the Triton kernels of logprobs, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from warpo.kernels._arguments.logprobs import LogprobsArguments, LogprobsBackwardArguments

Launch = tuple[str, Callable[[], None]]

# divisible by 16, or not even by 2; both past one block of 4096
ALIGNED_VOCAB, ODD_VOCAB = 8192 + 512, 8191


def logprobs(
    dtype: torch.dtype,
    vocab: int,
    full: bool,
    tokens: int = 4,
    temperature: float = 0.7,
    gradient_dtype: torch.dtype | None = None,
) -> None:
    from warpo.kernels import _triton

    logits = torch.empty(1, tokens, vocab, dtype=dtype)
    targets = torch.zeros(1, tokens, dtype=torch.int64)
    row = torch.empty(1, tokens)
    entropy, token_temperature = (row, row) if full else (None, None)
    forward = LogprobsArguments(
        rows=1,
        steps=tokens,
        vocab=vocab,
        logits=logits,
        targets=targets,
        temperature=temperature,
        token_temperature=token_temperature,
        mask=flags(row, full),
        ignore_index=-100,
        logprobs=row,
        entropy=entropy,
        stats=torch.empty(1, tokens, 2),
        partials=None,
    )
    _triton.logprobs_forward(forward)
    _triton.logprobs_forward(forward._replace(partials=torch.empty(1, tokens, 8, 4)))
    backward = LogprobsBackwardArguments(
        forward=forward,
        grad_logprobs=row,
        grad_entropy=entropy,
        grad_logits=torch.empty_like(logits, dtype=gradient_dtype),
    )
    _triton.logprobs_backward(backward)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        for vocab, alignment in ((ALIGNED_VOCAB, "aligned"), (ODD_VOCAB, "odd")):
            for full in (False, True) if all_of_them else (True,):
                label = f"{short} {alignment}{' entropy mask' if full else ''}"
                yield label, partial(logprobs, dtype, vocab, full)
    rounding = partial(logprobs, torch.float32, gradient_dtype=torch.bfloat16)
    yield "f32, gradients of bf16", partial(rounding, ALIGNED_VOCAB, True)


def variations() -> Iterator[Callable[[], None]]:
    for tokens in (1, 16, 37):
        for vocab in (ALIGNED_VOCAB + 16, 64):
            yield partial(logprobs, torch.bfloat16, vocab, True, tokens, temperature=float(tokens))
        yield partial(logprobs, torch.bfloat16, 101, True, tokens)
