"""Choice of the calls that our kernels serve; the others go on to the library.

A replacement asks for what it needs by `require` and its kin, and the first thing that is not so
passes the call on, for a reason that is counted.
"""

import collections
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._checks import FLOATS


class PassOn(Exception):
    """Raised by a replacement whose call goes to the library.

    Attributes:
        reason: in words, for the counts.
        arguments: that the library gets instead of those of the call, if any.
    """

    def __init__(self, reason: str, arguments: tuple[Any, ...] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.arguments = reason, arguments


@dataclass
class Calls:
    """Calls of a replacement, not counting code that torch.compile compiled.

    Attributes:
        served: calls that ran on our kernels.
        passed_on: calls that went to the library, by reason.
    """

    served: int = 0
    passed_on: collections.Counter[str] = field(default_factory=collections.Counter)

    def clear(self) -> None:
        self.served = 0
        self.passed_on.clear()

    def __str__(self) -> str:
        reasons = [f"{count}: {reason}" for reason, count in self.passed_on.most_common()]
        return "; ".join(
            [f"{self.served} calls served, {self.passed_on.total()} passed on", *reasons]
        )


def require(condition: Any, reason: str) -> None:
    """Pass the call on for this reason unless the condition holds."""
    if not condition:
        raise PassOn(reason)


def require_served(*tensors: Tensor | None) -> None:
    """Pass the call on unless the kernels take these tensors: plain ones of float32, bfloat16 or
    float16, all on one device that has a backend, and outside the transforms of torch.func, such as
    vmap. None stands for an argument that was not given.
    """
    # Dynamo cannot ask functorch: compiled, the library's code would take the place of ours
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    ):
        raise PassOn("inside a transform of torch.func")
    device = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise PassOn(f"a {type(tensor).__name__}, not a plain tensor")
        if tensor.dtype not in FLOATS:
            raise PassOn(f"a tensor of {named(tensor.dtype)}")
        if device is None:
            device = tensor.device
            if device.type not in dispatch.DEVICES:
                raise PassOn(f"tensors on {device.type}")
        elif tensor.device != device:
            raise PassOn("tensors on two devices")


def as_flags(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels take it, for libraries that multiply by it: bool, or passed on where it
    holds weights, that is anything but 0 and 1.

    The values are looked at on a CPU. On a GPU that would wait for the device, and torch.compile
    has none: there integers, of which all three libraries make their masks, are taken for flags,
    and floats are passed on.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    flags = mask.bool()
    if mask.is_floating_point():
        require(_is_readable(mask), "a float mask where its values cannot be read")
        require(torch.equal(flags.to(mask.dtype), mask), "a mask of weights")
    elif _is_readable(mask):
        import numpy as np  # here, since warpo itself does without

        require(np.bitwise_or.reduce(mask.numpy().ravel()) in (0, 1), "a mask of weights")
    return flags


def _is_readable(mask: Tensor) -> bool:
    return mask.is_cpu and not torch.compiler.is_compiling()


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def promoted(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """Type in which PyTorch combines these tensors, None standing for no argument."""
    dtype = first.dtype
    for x in others:
        if x is not None and x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def require_constant(*tensors: Tensor | None) -> None:
    """Pass the call on where a gradient is wanted with respect to one of these."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                raise PassOn("a gradient of what the kernels take for constant")
