"""verl's ways to make one loss of the losses of tokens, as those of `ops`."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from warpo.kernels.integrations.serving import PassOn, as_flags, require

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
) -> tuple[str, float | Tensor | None]:
    """Aggregation and denominator, None for the number of valid tokens. Passed on is what verl
    refuses and what is not a number.

    mask: bool [B, T].
    """
    name = _AGGREGATIONS.get(mode)
    of_tokens = name == "token-mean"
    count = batch_num_tokens if of_tokens else global_batch_size
    if name is None:
        raise PassOn("an aggregation without a kernel")
    require(_are_numbers(dp_size, count, loss_scale_factor), "counts that are not numbers")
    require(dp_size > 0, "a count of 0")
    if mode == "token-sum":
        return name, 1.0 / dp_size
    if count is None:
        require(dp_size <= 1, "several ranks without a count")
        if of_tokens:
            return name, None
        # verl leaves sequences without a valid token out
        count = mask.any(-1).sum(dtype=torch.float32)
    else:
        require(count >= 0, "a count below 0")
    if mode == "seq-mean-token-sum-norm":
        count = count * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return name, count if dp_size == 1 else count / dp_size


def _are_numbers(*values: Any) -> bool:
    for value in values:  # noqa: SIM110  (a generator takes twice as long)
        if value is not None and type(value) is not int and not isinstance(value, Real):
            return False
    return True


def flags_of(mask: Any, like: Tensor) -> Tensor:
    """The mask as the kernels take it, of plain tokens, [B, T]."""
    require(type(mask) is Tensor and mask.dtype != torch.float64, "a mask of another kind")
    require(like.dim() == 2, "tensors that are not [B, T]")
    require(mask.shape == like.shape, "a mask of another shape")
    require(mask.device == like.device, "tensors on two devices")
    flags = as_flags(mask)
    assert flags is not None
    return flags


def result_dtype(mode: str, *tensors: Tensor | None) -> torch.dtype:
    """Type of verl's result from these tensors, the mask among them."""
    if mode.startswith("seq"):
        return torch.float32  # it weighs the sequences in float32
    found: torch.dtype | None = None
    for x in tensors:
        if x is not None and x.dtype != found and x.dtype != torch.bool:
            found = x.dtype if found is None else torch.promote_types(found, x.dtype)
    return torch.bool if found is None else found
