"""TRL's log-probabilities: of logits, and of hidden states through the fused head."""

import functools
from collections.abc import Callable

import torch

from warpo.bench.dropin.case import DropIn
from warpo.kernels.integrations.patching import is_ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS = ((8, 64, 512), (8, 64, 32000), (4, 256, 32000), (4, 256, 151936))
# tokens, hidden size, vocabulary
HEADS = ((64, 64, 512), (512, 256, 32000), (1024, 896, 151936))
LABELS = {
    "selective_log_softmax": True,
    "entropy_from_logits": False,
    "selective_log_softmax_and_entropy": True,
    "CPOTrainer.get_batch_logps": True,
    "ORPOTrainer.get_batch_logps": True,
}


def cases() -> list[DropIn]:
    found = []
    for dtype in DTYPES:
        for mode in ("forward", "forward + backward"):
            for function, labels in LABELS.items():
                for shape in LOGITS:
                    make = functools.partial(_logits, shape, DTYPES[dtype], mode, labels)
                    found.append(_case(function, shape, dtype, mode, make))
            for shape in HEADS:
                make = functools.partial(_head, shape, DTYPES[dtype], mode)
                found.append(_case("ChunkedLogProbFunction.forward", shape, dtype, mode, make))
    return found


def _case(function: str, shape: tuple, dtype: str, mode: str, make: Callable) -> DropIn:
    return DropIn(function=function, size=f"{list(shape)} {dtype}", mode=mode, make=make)


def _logits(shape: tuple, dtype: torch.dtype, mode: str, labels: bool) -> Callable:
    logits = torch.randn(shape).to(dtype).requires_grad_(mode != "forward")
    arguments = [torch.randint(0, shape[-1], shape[:-1])] if labels else []
    return functools.partial(_call, [logits], lambda function: function(logits, *arguments))


def _head(shape: tuple, dtype: torch.dtype, mode: str) -> Callable:
    tokens, hidden_size, vocab = shape
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_(mode != "forward")
    weight = (torch.randn(vocab, hidden_size) / hidden_size**0.5).to(dtype)
    weight.requires_grad_(mode != "forward")
    targets = torch.randint(0, vocab, (tokens,))
    # as GRPO calls it: TRL's own tile of the vocabulary, and its second output
    options = (None, targets, 1.0, 32768, None, 1.0, ("entropy",))

    def apply(forward: Callable) -> list:
        results = _function(forward).apply(hidden, weight, *options)
        return [x for x in results if x is not None]

    return functools.partial(_call, [hidden, weight], apply)


@functools.lru_cache
def _function(forward: Callable) -> type[torch.autograd.Function]:
    """TRL's class with this half, and the other half of the same library."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from warpo.kernels.integrations import trl

    name = "ChunkedLogProbFunction.backward"
    with trl.patch(only=[name] if is_ours(forward) else []):
        backward = vars(ChunkedLogProbFunction)["backward"]
    members = {"forward": staticmethod(forward), "backward": backward}
    return type("Function", (torch.autograd.Function,), members)


def _call(leaves: list[torch.Tensor], call: Callable, function: Callable) -> object:
    results = call(function)
    if leaves[0].requires_grad:
        for leaf in leaves:
            leaf.grad = None
        flat = results if isinstance(results, (tuple, list)) else [results]
        sum(x.sum() for x in flat).backward()
    return results
