"""The compiled backends `_cpu` and `_cuda`: tensors to pointers.

An operation of a backend takes the named tuple of its struct in csrc/arguments, see `_arguments`:
sizes, tensors, numbers, and None for an absent optional. Arguments are checked and outputs
allocated by the caller. The Triton backend has the same functions with the same arguments.
"""

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from warpo.kernels._arguments.backend import Backend, CpuBackend
from warpo.kernels._flattening import TUPLE_CLASSES

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.bool: 3,
    torch.int32: 4,
    torch.int64: 5,
}


def _view(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """The C++ View of the leading two dimensions, and rows and columns of the C++ Matrix; a vector
    is one row, and so is a dense Matrix.
    """
    stride, code = x.stride(), DTYPE_CODES[x.dtype]
    shape = (1, x.numel()) if x.is_contiguous() else x.shape[:2]
    if len(stride) >= 2:
        return (x.data_ptr(), stride[0], stride[1], code, shape[0], shape[-1])
    return (x.data_ptr(), 0, stride[0] if stride else 0, code, 1, x.numel())


# told by their type alone: isinstance of a Tensor takes 0.1 us for each that is none
_NUMBERS = frozenset((int, float, bool, type(None)))


def _field(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _view(x)
    if isinstance(x, list):
        return [_field(item) for item in x]
    return _views(x) if isinstance(x, tuple) else x


def _views(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([x if type(x) in _NUMBERS else _field(x) for x in arguments])


def _of_views(function: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        function(*_views(arguments))

    return call


def _first_tensor(arguments: Sequence[Any]) -> Tensor | None:
    for x in arguments:
        found = _first_tensor(x) if isinstance(x, (tuple, list)) else x
        if isinstance(found, Tensor):
            return found
    return None


def _on_stream(function: Callable[..., None]) -> Callable[..., None]:
    """With device and current stream of the first tensor at the end."""

    def call(*arguments: Any) -> None:
        tensor = _first_tensor(arguments)
        assert tensor is not None
        device = tensor.get_device()
        function(*arguments, device, torch._C._cuda_getCurrentRawStream(device))

    return call


class Native:
    """The operations of `warpo.kernels._cpu` or `warpo.kernels._cuda`, as attributes."""

    def __init__(self, module: ModuleType) -> None:
        # with DLPack's exchange API, torch >= 2.10, the module reads tensors itself: of nine a call
        # takes 3 us less
        api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        reads = api is not None and module.read_tensors(Tensor, api)
        for tuple_class in (*TUPLE_CLASSES, *_arguments()):
            module.call_in_place(tuple_class)
        on_cuda = module.__name__.endswith("_cuda")
        for name, function in vars(module).items():
            if callable(function) and not name.startswith("_") and name not in _HELPERS:
                function = function if reads else _of_views(function)
                setattr(self, name, _on_stream(function) if on_cuda else function)


def _arguments() -> set[Any]:
    """The classes of the tuples that operations take, and of the tuples within those."""
    members = (*vars(Backend).values(), *vars(CpuBackend).values())
    taken = [inspect.get_annotations(x) for x in members if callable(x)]
    classes = {x["arguments"] for x in taken if "arguments" in x}
    kinds = {kind for x in classes for kind in inspect.get_annotations(x).values()}
    inner = kinds | {item for kind in kinds for item in get_args(kind)}
    return classes | {kind for kind in inner if hasattr(kind, "_fields")}


_HELPERS = ("instruction_set", "read_tensors", "call_in_place", "build")
