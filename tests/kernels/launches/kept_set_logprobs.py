"""Launches of the Triton kernels of kept_set_logprobs, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.kept_set_logprobs import (
    KeptSetLogprobsArguments,
    KeptSetLogprobsBackwardArguments,
    KeptSetWeightGradientArguments,
)

Launch = tuple[str, Callable[[], None]]


def kept_set_logprobs(dtype: torch.dtype, full: bool, tokens: int = 4, size: int = 256) -> None:
    from warpo.kernels import _triton

    vocab, kept = 64, 5 * tokens
    hidden, weight = torch.empty(tokens, size, dtype=dtype), torch.empty(vocab, size, dtype=dtype)
    integers = torch.int64 if full else torch.int32
    ids = torch.zeros(kept, dtype=integers)
    offsets = 5 * torch.arange(tokens + 1, dtype=integers)
    row, logits, stats = torch.empty(tokens), torch.empty(kept), torch.empty(tokens, 2)
    bias = torch.empty(vocab, dtype=dtype) if full else None
    forward = KeptSetLogprobsArguments(
        tokens=tokens,
        vocab=vocab,
        hidden_size=size,
        num_kept=kept,
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=torch.zeros(tokens, dtype=torch.int64),
        kept_ids=ids,
        kept_offsets=offsets,
        temperature=0.7,
        token_temperature=row if full else None,
        logprobs=row,
        kept_logits=logits,
        stats=stats,
    )
    _triton.kept_set_logprobs_forward(forward)
    backward = KeptSetLogprobsBackwardArguments(
        forward=forward,
        grad_logprobs=row,
        grad_hidden=torch.empty_like(hidden) if full else None,
        grad_logits=logits,
    )
    _triton.kept_set_logprobs_backward(backward)
    places, bounds = (torch.zeros(n, dtype=torch.int64) for n in (kept, vocab + 1))
    of_weight = KeptSetWeightGradientArguments(
        vocab=vocab,
        hidden_size=size,
        hidden=hidden,
        order=places,
        tokens=places,
        offsets=bounds,
        grad_logits=logits,
        grad_weight=torch.empty_like(weight),
        grad_bias=torch.empty(vocab) if full else None,
    )
    _triton.kept_set_weight_gradient(of_weight)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        for full in (False, True) if all_of_them else (True,):
            yield f"{short}{' full' * full}", partial(kept_set_logprobs, dtype, full)


def variations() -> Iterator[Callable[[], None]]:
    for tokens in (1, 16, 37):
        for size in (1, 77, 512):
            yield partial(kept_set_logprobs, torch.bfloat16, True, tokens, size)
