"""Logprobs of the predicted tokens by a model's own head, with no tensor of tokens x vocabulary
where that would be larger than LOGITS_BYTES.

    logits = hidden weight^T + bias,   logp, entropy as in `ops.linear_logprobs_and_entropy`

The head is fused with its logprobs where the model's logits are what one linear layer returns, and
nothing else: a stand-in for the result of that layer has to come out of the model as its logits,
untouched, in each pass. Soft caps, scales and conversions of the logits make another tensor of it;
such models make their logits, and so do heads with hooks, and in dtypes that no kernel has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from warpo.engine.models.linear import Linear, linear
from warpo.kernels import ops

# Logits in float32 up to which they are made: a step of a small vocabulary keeps its three matrix
# products, a fused head of more takes four, in a workspace of 64 MiB on a CPU.
LOGITS_BYTES = 256 << 20

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Float32Head(nn.Linear):
    """logits = float32(hidden) float32(weight)^T, whatever the dtype of the weight, which stays."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden.float(), self.weight.float(), bias)


# models whose logits are more than the result of their head
_transforming: WeakSet[nn.Module] = WeakSet()


def logprobs_of(
    model: nn.Module,
    run: Callable[[], Any],
    targets: Tensor,
    temperature: float,
) -> tuple[ops.LogprobsAndEntropy, Any]:
    """logprobs and entropy, each (M,) float32, of M targets, and the output of the model.

    Args:
        run: a forward pass of the model, with logits (1, M, V).
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if model not in _transforming and _is_linear(head):
        is_large = targets.numel() * head.weight.shape[0] * 4 > LOGITS_BYTES
        found = _fused(head, run, targets, temperature) if is_large else None
        if found is not None:
            return found
        if is_large:
            _transforming.add(model)
    output = run()
    logits = output.logits[0]
    return ops.logprobs_and_entropy(logits, targets, temperature=temperature), output


def _is_linear(head: Any) -> bool:
    return (
        type(head) in (nn.Linear, Linear, Float32Head)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and head.weight.dtype in _KERNEL_DTYPES
    )


def _fused(
    head: Any, run: Callable[[], Any], targets: Tensor, temperature: float
) -> tuple[ops.LogprobsAndEntropy, Any] | None:
    """None where the logits are not the result of the head."""
    with _stand_in(head) as calls:
        output = run()
    if len(calls) != 1:
        return None
    hidden, result = calls[0]
    is_result = output.logits is result and result._version == 0
    if not is_result or hidden.dtype != head.weight.dtype:
        return None
    logprobs = ops.linear_logprobs_and_entropy(
        hidden[0],
        head.weight,
        targets,
        bias=head.bias,
        temperature=temperature,
        # of two bfloat16 numbers the product is exact in float32, which the sums are in
        logits_dtype="float32" if type(head) is Float32Head else "input",
    )
    return logprobs, output


@contextmanager
def _stand_in(head: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the head return one number per token; yields its inputs and these."""
    calls: list[tuple[Tensor, Tensor]] = []

    def forward(hidden: Tensor) -> Tensor:
        # a copy, whose version says whether it was changed in place
        result = hidden.detach()[..., :1].clone()
        if type(head) is Float32Head:
            result = result.float()
        calls.append((hidden, result))
        return result

    head.forward = forward
    try:
        yield calls
    finally:
        del head.forward
