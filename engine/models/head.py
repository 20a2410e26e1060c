"""Logprobs and policy losses of the predicted tokens by a model's own head, with no tensor of
tokens x vocabulary where that would be larger than LOGITS_BYTES.

    logits = hidden weight^T + bias

The head is fused with what is made of its logits where these are what one linear layer returns, and
nothing else: a stand-in for the result of that layer has to come out of the model as its logits,
untouched, in each pass. Smaller logits of that kind are made, and their gradient is written over
them; those of a float32 head of a narrower weight are not, as that takes a float32 copy of it. Soft
caps, scales and conversions of the logits make another tensor of it; such models make their logits
and keep them, and so do heads with hooks, and in dtypes that no kernel has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from warpo.engine.models.linear import Linear, linear
from warpo.kernels import dispatch, ops
from warpo.kernels.objectives import Objective

# Logits in float32 up to which they are made: a step of a small vocabulary keeps its three matrix
# products, logprobs by a fused head of more take four, in a workspace of 64 MiB on a CPU.
LOGITS_BYTES = 256 << 20

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Float32Head(nn.Linear):
    """logits = float32(hidden) float32(weight)^T, whatever the dtype of the weight, which stays."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden.float(), self.weight.float(), bias)


@dataclass(frozen=True, slots=True)
class FromLogits:
    """Predictions of M tokens by their logits, (M, V).

    Attributes:
        owned: nothing else reads the logits, so their gradient is written over them.
    """

    logits: Tensor
    owned: bool = False

    def logprobs(self, targets: Tensor, temperature: float) -> ops.LogprobsAndEntropy:
        """logprobs and entropy, each (M,) float32, through which one backward pass goes."""
        return ops.logprobs_and_entropy(
            self.logits, targets, temperature=temperature, inplace_backward=self.owned
        )

    def policy_loss(
        self, targets: Tensor, advantages: Tensor, objective: Objective, **options: Any
    ) -> ops.PolicyLossFromLogits:
        """Loss and metrics as of `ops.policy_loss`; the logprobs are constants."""
        return ops.policy_loss_from_logits(
            self.logits, targets, advantages, objective, inplace=self.owned, **options
        )


@dataclass(frozen=True, slots=True)
class FromHidden:
    """Predictions of M tokens by their hidden states, (M, H), and the linear layer after them."""

    hidden: Tensor
    head: Any

    def logprobs(self, targets: Tensor, temperature: float) -> ops.LogprobsAndEntropy:
        return ops.linear_logprobs_and_entropy(
            self.hidden, self.head.weight, targets, temperature=temperature, **self._options
        )

    def policy_loss(
        self, targets: Tensor, advantages: Tensor, objective: Objective, **options: Any
    ) -> ops.PolicyLossFromHidden:
        options |= self._options
        return ops.policy_loss_from_hidden(
            self.hidden, self.head.weight, targets, advantages, objective, **options
        )

    @property
    def _options(self) -> dict[str, Any]:
        # of two bfloat16 numbers the product is exact in float32, which the sums are in
        is_float32 = type(self.head) is Float32Head
        return {"bias": self.head.bias, "logits_dtype": "float32" if is_float32 else "input"}


Predictions = FromLogits | FromHidden

# models whose logits are more than the result of their head
_transforming: WeakSet[nn.Module] = WeakSet()


def predictions_of(
    model: nn.Module, run: Callable[[], Any], num_tokens: int
) -> tuple[Predictions, Any]:
    """Predictions of the M = num_tokens tokens, and the output of the model.

    Args:
        run: a forward pass of the model, with logits (1, M, V).
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if model in _transforming or not _is_linear(head):
        output = run()
        return FromLogits(output.logits.squeeze(0)), output
    logits_bytes = num_tokens * head.weight.shape[0] * 4
    fuses = logits_bytes > LOGITS_BYTES or _widens(head)
    with _watched(head, stand_in=fuses) as calls:
        output = run()
    if _is_result(output.logits, calls, head.weight.dtype):
        if fuses:
            return FromHidden(calls[0][0].squeeze(0), head), output
        # the reference keeps what it reads
        owned = dispatch.choose(output.logits, None) != "reference"
        return FromLogits(output.logits.squeeze(0), owned), output
    _transforming.add(model)
    if fuses:
        output = run()
    return FromLogits(output.logits.squeeze(0)), output


def _is_linear(head: Any) -> bool:
    return (
        type(head) in (nn.Linear, Linear, Float32Head)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and head.weight.dtype in _KERNEL_DTYPES
    )


def _widens(head: Any) -> bool:
    """True if a float32 copy of the weight would have to be made for the logits."""
    return type(head) is Float32Head and head.weight.dtype != torch.float32


def _is_result(logits: Tensor, calls: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> bool:
    """True if the logits are what a head of this dtype has returned, untouched."""
    if len(calls) != 1:
        return False
    hidden, result = calls[0]
    return logits is result and result._version == 0 and hidden.dtype == dtype


@contextmanager
def _watched(head: Any, *, stand_in: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields the inputs and results of the head; a stand-in is one number per token."""
    calls: list[tuple[Tensor, Tensor]] = []

    def forward(hidden: Tensor) -> Tensor:
        if stand_in:
            # a copy, whose version says whether it was changed in place
            result = hidden.detach()[..., :1].clone()
            result = result.float() if type(head) is Float32Head else result
        else:
            result = type(head).forward(head, hidden)
        calls.append((hidden, result))
        return result

    head.forward = forward
    try:
        yield calls
    finally:
        del head.forward
