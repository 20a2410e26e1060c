"""Launches of the Triton kernels of logprobs, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]

# divisible by 16, or not even by 2; both past one block of 4096
ALIGNED_VOCAB, ODD_VOCAB = 8192 + 512, 8191


def logprobs(
    dtype: torch.dtype, vocab: int, full: bool, tokens: int = 4, temperature: float = 0.7
) -> None:
    from warpo.kernels import _triton

    logits = torch.empty(1, tokens, vocab, dtype=dtype)
    targets = torch.zeros(1, tokens, dtype=torch.int64)
    row = torch.empty(1, tokens)
    entropy, token_temperature = (row, row) if full else (None, None)
    stats = torch.empty(1, tokens, 2)
    common = (
        *logits.shape,
        logits,
        targets,
        temperature,
        token_temperature,
        flags(row, full),
        -100,
    )
    for partials in (None, torch.empty(1, tokens, 8, 4)):
        _triton.logprobs_forward(*common, row, entropy, stats, partials)
    _triton.logprobs_backward(
        *common, None, entropy, stats, None, row, entropy, torch.empty_like(logits)
    )


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        for vocab, alignment in ((ALIGNED_VOCAB, "aligned"), (ODD_VOCAB, "odd")):
            for full in (False, True) if all_of_them else (True,):
                label = f"{short} {alignment}{' entropy mask' if full else ''}"
                yield label, partial(logprobs, dtype, vocab, full)


def variations() -> Iterator[Callable[[], None]]:
    for tokens in (1, 16, 37):
        for vocab in (ALIGNED_VOCAB + 16, 64):
            yield partial(logprobs, torch.bfloat16, vocab, True, tokens, temperature=float(tokens))
        yield partial(logprobs, torch.bfloat16, 101, True, tokens)
