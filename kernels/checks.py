"""Checks of arguments that all operations share. Each error names the argument, what is wanted and
what came.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLAGS = (torch.bool, torch.uint8)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """dtype, shape and device of one argument; a sharded tensor is refused with the way to gather
    it.
    """
    if (
        type(tensor) is Tensor
        and tensor.dtype in dtypes
        and (shape is None or tensor.shape == shape)
        and (like is None or tensor.is_cpu and like.is_cpu or tensor.device == like.device)
        and not hasattr(tensor, "ds_id")
    ):
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor, of which a kernel sees only the local shard: "
            f"pass {name}.full_tensor()"
        )
    if tensor.numel() == 0 and hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name} is an empty ZeRO-3 shard: "
            f"call within deepspeed.zero.GatheredParameters([{name}])"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {_names(dtypes)}, got {_names([tensor.dtype])}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the other arguments on {like.device}: move it"
        )


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """An optional bool or uint8 tensor; another dtype is refused, as its meaning would be a
    guess.
    """
    if mask is None:
        return
    if isinstance(mask, Tensor) and mask.dtype not in FLAGS:
        raise ValueError(
            f"{name} must be bool | uint8, got {_names([mask.dtype])}: pass {name}.bool() "
            "(only ops.aggregate takes weights)"
        )
    check_tensor(name, mask, FLAGS, shape, like)


def check_no_grad(name: str, tensor: Tensor | None) -> None:
    """An argument through which no gradient flows is refused if one is asked for."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but is a constant of the operation: pass {name}.detach()"
        )


def check_unspent(spent: bool) -> None:
    """Refuse a second backward through logits that the first one has overwritten."""
    if spent:
        raise RuntimeError(
            "logprobs was called with inplace_backward=True, so its logits are overwritten by the "
            "first backward: call it with inplace_backward=False to go through the graph twice"
        )


def as_rows(name: str, tensor: Tensor, keep: int = 0) -> Tensor:
    """A view `[rows, steps]` plus the last `keep` dimensions; leading dimensions are merged, never
    copied.

    Raises:
        ValueError: the strides of the leading dimensions do not allow a view.
    """
    lead = tensor.dim() - keep
    if lead == 2:
        return tensor
    if lead < 2:
        return tensor.view((1,) * (2 - lead) + tensor.shape)
    tail = tensor.shape[lead - 1 :]
    try:
        return tensor.view(
            (-1, *tail) if tensor.numel() else (tensor.shape[: -len(tail)].numel(), *tail)
        )
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
            "cannot be viewed as rows: "
            f"pass {name}.contiguous()"
        ) from None
