"""OpenRLHF's losses of tokens: how they are aggregated, and the value loss.

They differ in three points. Masked slots are never read: an infinity or NaN there does not
spread. Without a valid token the loss is 0, and not NaN, unless a count was given. A loss of bf16
is summed in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.openrlhf._library import (
    LOSSES,
    library,
    same_shape,
)
from warpo.kernels.integrations.serving import (
    as_flags,
    promoted,
    require,
    require_constant,
    require_served,
)


class Normaliser(NamedTuple):
    """Reduction of the losses of tokens to one.

    Attributes:
        aggregation, denominator: of our operations.
        in_float32: whatever the dtype of the losses; the library divides by a float32 tensor.
    """

    aggregation: str
    denominator: float | Tensor | None
    in_float32: bool

    def dtype(self, first: Tensor, *others: Tensor | None) -> torch.dtype:
        """Type of a loss that is made of these tensors."""
        return torch.float32 if self.in_float32 else promoted(first, *others)


def normaliser(
    flags: Tensor | None,
    token_level: bool,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
) -> Normaliser:
    """Passed on are counts that our operations do not take, or that the library refuses."""
    count = batch_num_tokens if token_level else global_batch_size
    require(flags is not None or (token_level and count is None), "no mask, but a count")
    aggregation = "token-mean" if token_level else "sequence-mean-token-mean"
    if count is None:
        if token_level or flags is None:
            return Normaliser(aggregation, None, False)
        # sequences without a valid token do not count
        return Normaliser(aggregation, flags.any(-1).sum(dtype=torch.float32), True)
    if isinstance(count, Tensor):
        scalar = count.dtype == torch.float32 and not count.dim() and not count.requires_grad
        require(scalar, "a count that is not a float32 scalar")
    else:
        require(count > 0, "a count of 0")
    denominator = count if dp_size == 1 else count / dp_size
    return Normaliser(aggregation, denominator, not token_level or isinstance(count, Tensor))


def require_tokens(first: Tensor, *others: Tensor | None) -> None:
    require(first.dim() == 2, "tensors that are not [B, T]")
    require(same_shape(first, *others), "tensors of two shapes")


@library.replaces(LOSSES, "ValueLoss.forward", "value_loss")
def value_loss(
    original: Callable,
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """Without clipping it is the library's: a squared difference and a mean."""
    clip_range = self.clip_eps
    require(clip_range is not None and clip_range >= 0, "no clip range")
    require_served(values, old_values, returns)
    require_tokens(values, old_values, returns, action_mask)
    require_constant(old_values, returns)
    flags = as_flags(action_mask)
    scale = normaliser(flags, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    loss = ops.value_loss(
        values,
        old_values,
        returns,
        mask=flags,
        clip_range=clip_range,
        aggregation=scale.aggregation,
        denominator=scale.denominator,
    ).loss
    return loss.to(scale.dtype(values, old_values, returns, action_mask))
