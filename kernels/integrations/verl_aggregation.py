"""verl's ways to make one loss of the losses of tokens, as those of `ops`."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from warpo.kernels.integrations.patching import as_flags

# verl's mode -> the aggregation of `objectives` with the same sum, to be divided by a denominator
_AGGREGATIONS = {
    "token-mean": "token-mean",
    "token-sum": "token-mean",
    "seq-mean-token-sum": "sequence-mean-token-sum",
    "seq-mean-token-sum-norm": "sequence-mean-token-sum",
    "seq-mean-token-mean": "sequence-mean-token-mean",
}


def aggregation(
    mask: Tensor,
    mode: str,
    dp_size: Any = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[str, float | Tensor | None] | None:
    """Aggregation and denominator, None for the number of valid tokens; all None for what verl
    refuses and what is not a number: it is left to verl.

    mask: bool | uint8 [B, T].
    """
    name = _AGGREGATIONS.get(mode)
    of_tokens = name == "token-mean"
    count = batch_num_tokens if of_tokens else global_batch_size
    if name is None or not _are_numbers(dp_size, count, loss_scale_factor) or not dp_size > 0:
        return None
    if mode == "token-sum":
        return name, 1.0 / dp_size
    if count is None:
        if dp_size > 1:
            return None
        if of_tokens:
            return name, None
        # verl leaves sequences without a valid token out
        count = mask.any(-1).sum(dtype=torch.float32)
    elif count < 0:
        return None
    if mode == "seq-mean-token-sum-norm":
        count = count * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return name, count if dp_size == 1 else count / dp_size


def _are_numbers(*values: Any) -> bool:
    for value in values:  # noqa: SIM110  (a generator takes twice as long)
        if value is not None and type(value) is not int and not isinstance(value, Real):
            return False
    return True


def flags_of(mask: Any, like: Tensor) -> Tensor | None:
    """The mask as the kernels take it; None if it is not one of plain tokens, [B, T]."""
    if type(mask) is not Tensor or mask.dtype == torch.float64 or like.dim() != 2:
        return None
    if mask.shape != like.shape or mask.device != like.device:
        return None
    return as_flags(mask)


def result_dtype(mode: str, *tensors: Tensor | None) -> torch.dtype:
    """Of verl's result from these tensors, the mask among them."""
    if mode.startswith("seq"):
        return torch.float32  # it weighs the sequences in float32
    found: torch.dtype | None = None
    for x in tensors:
        if x is not None and x.dtype != found and x.dtype != torch.bool:
            found = x.dtype if found is None else torch.promote_types(found, x.dtype)
    return torch.bool if found is None else found
