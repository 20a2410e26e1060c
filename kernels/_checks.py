"""Checks of arguments that all operations share. Each error names the argument, what is wanted,
what came and the cure.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLAGS = (torch.bool, torch.uint8)
_PLAIN = (Tensor, nn.Parameter)
_CASTS = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.bool: "bool",
    torch.int32: "int",
    torch.int64: "long",
}


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """Refuse an argument of another dtype, shape or device, or whose memory is not what pointer and
    strides say; the message names the cure.
    """
    try:
        if (
            type(tensor) in _PLAIN
            and tensor.dtype in dtypes
            and (
                is_dynamo_compiling()
                or tensor.data_ptr() != 0
                and not tensor.is_neg()
                or tensor.numel() == 0
            )
            and (not tensor.is_nested if shape is None else tensor.shape == shape)
            and (like is None or tensor.is_cpu and like.is_cpu or tensor.device == like.device)
            and not hasattr(tensor, "ds_id")
        ):
            return
    except RuntimeError:
        pass  # of a tensor without a pointer or a shape, which is told below
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    _check_memory(name, tensor)
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} must be {_names(dtypes)}, got {_names([tensor.dtype])}: "
            f"pass {name}.{_CASTS[dtypes[0]]}()"
        )
    if shape is not None and tensor.shape != shape:
        raise ValueError(
            f"{name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}"
            f"{_reshape(name, tuple(tensor.shape), tuple(shape))}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the other arguments on {like.device}: move it"
        )


def _reshape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The cure of a shape that differs by dimensions of size 1 only."""
    if [size for size in shape if size != 1] == [size for size in wanted if size != 1]:
        return f": pass {name}.reshape({wanted})"
    if len(shape) <= len(wanted) and all(
        a in (1, b) for a, b in zip(shape[::-1], wanted[::-1], strict=False)
    ):
        return f": pass {name}.expand({wanted})"
    return ""


def _check_memory(name: str, tensor: Tensor) -> None:
    def refuse(what: str, cure: str) -> NoReturn:
        raise ValueError(f"{name} {what}: pass {cure}")

    kind = type(tensor)
    if kind.__name__ == "DTensor":
        refuse("is a DTensor, of which a kernel sees the local shard only", f"{name}.full_tensor()")
    if tensor.numel() == 0 and hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name} is an empty ZeRO-3 shard: "
            f"call within deepspeed.zero.GatheredParameters([{name}])"
        )
    if is_dynamo_compiling() or kind.__name__ in ("FakeTensor", "FunctionalTensor"):
        return
    if tensor.is_nested:
        refuse("is a nested tensor", f"{name}.to_padded_tensor(0.0) and a mask, or cu_seqlens")
    if tensor.layout is not torch.strided:
        refuse(f"is of layout {tensor.layout}", f"{name}.to_dense()")
    if kind not in _PLAIN and "__torch_dispatch__" in _overridden(kind):
        refuse(
            f"is a {kind.__name__}, which keeps its numbers in tensors of its own",
            f"the plain tensor of {name}",
        )
    if tensor.is_quantized:
        refuse("is quantized", f"{name}.dequantize()")
    if tensor.is_neg():
        refuse("has the negative bit set", f"{name}.resolve_neg()")
    if tensor._is_zerotensor():
        refuse("is zeros without memory (torch._efficientzerotensor)", f"{name}.clone()")
    if tensor.is_meta:
        refuse("is on the meta device, which holds no numbers", "one on cpu or cuda")
    if torch._C._are_functorch_transforms_active():
        return  # the operator refuses it, the backend 'reference' need not
    if tensor.numel() and tensor.data_ptr() == 0:
        refuse(
            "has no memory: its storage was resized to 0, as FSDP does between uses",
            f"{name} while it is gathered, within the module's forward or summon_full_params",
        )


def _overridden(kind: type) -> set[str]:
    """Names of what a subclass of Tensor defines anew."""
    own = kind.__mro__[: kind.__mro__.index(Tensor)]
    return {name for base in own for name in vars(base)}


def is_fake(tensor: Tensor) -> bool:
    """True if it has a shape and no numbers, and no graph is traced with it."""
    return type(tensor).__name__ == "FakeTensor"


def as_plain(gradient: Tensor) -> Tensor:
    """An upstream gradient as memory that a kernel reads: autograd may hand over zeros without
    memory, the negative bit or a sparse layout, which the caller has no hand in.
    """
    if is_dynamo_compiling() or type(gradient) is not Tensor:
        return gradient
    try:
        if gradient.data_ptr() != 0 and not gradient.is_neg() or gradient.numel() == 0:
            return gradient
    except RuntimeError:
        gradient = gradient.to_dense()
    return gradient.resolve_neg().clone()


def as_int64(
    name: str, tensor: Tensor, shape: tuple[int, ...] | None = None, like: Tensor | None = None
) -> Tensor:
    """Checked indices; int32 is converted, which takes 8 bytes per element."""
    check_tensor(name, tensor, (torch.int64, torch.int32), shape, like)
    return tensor if tensor.dtype == torch.int64 else tensor.long()


def as_temperature(
    temperature: float | Tensor, shape: tuple[int, ...], like: Tensor
) -> float | Tensor:
    """A checked number, or one per token: of a scalar tensor the same for each, without a copy.
    What is on the device is not looked at: a kernel poisons the tokens whose temperature is not
    finite and > 0.
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0:
            check_tensor("temperature", temperature, (torch.float32,), (), like)
            temperature = temperature.expand(shape)
        else:
            check_tensor("temperature", temperature, (torch.float32,), shape, like)
        check_no_grad("temperature", temperature)
    elif not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and > 0, got {temperature}: greedy choice has no logprobs"
        )
    return temperature


def check_number(name: str, value: Any) -> None:
    """An option that the host reads must be a number: to read a tensor would stop it."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number, got a Tensor: pass {name}.item()")


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


def check_own_memory(name: str, tensor: Tensor, cure: str) -> None:
    """Refuse to write where two elements may share a place, as in expanded or unfolded views."""
    if is_dynamo_compiling():
        return
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"{name} is written to, and its elements must not overlap, got shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}: {cure}"
            )
        reach += stride * (size - 1)


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
