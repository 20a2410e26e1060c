"""verl's log-probabilities and entropies: a small batch, and the vocabularies of two models."""

from collections.abc import Callable

import torch

from warpo.bench.dropin.case import DropIn

SHAPES = ((8, 64, 1024), (4, 256, 32000), (4, 256, 151936))
DTYPES = (torch.float32, torch.bfloat16)
LOGPROBS = ("logprobs_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_naive")
ENTROPIES = ("entropy_from_logits", "entropy_from_logits_with_chunking")


def cases() -> list[DropIn]:
    return [
        _case(name, shape, dtype, mode)
        for name in LOGPROBS + ENTROPIES
        for shape in SHAPES
        for dtype in DTYPES
        for mode in ("forward", "forward + backward")
    ]


def _case(name: str, shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> DropIn:
    rows, steps, vocab = shape
    lead = (rows * steps,) if "chunking" in name else (rows, steps)

    def make() -> Callable[[Callable], object]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn((*lead, vocab), generator=generator).to(dtype)
        labels = torch.randint(0, vocab, lead, generator=generator)
        given = (logits,) if name in ENTROPIES else (logits, labels)
        if mode == "forward":
            return lambda function: function(*given)
        logits.requires_grad_()

        def run(function: Callable) -> object:
            logits.grad = None
            result = function(*given)
            result.backward(torch.ones_like(result))
            return logits.grad

        return run

    size = f"{[*lead, vocab]} {str(dtype).removeprefix('torch.')}"
    return DropIn(function=name, size=size, mode=mode, make=make)
