"""Numbers under torch.compile: one that has changed between calls travels as a tensor, so that
another value does not compile again. As an argument of an operator Dynamo would make it a constant.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling


def is_constant(value: Any) -> bool:
    """Whether a number has one value in the graph that is traced; a tensor stands for many."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not isinstance(value, Tensor) and has_static_value(value)


def as_scalar(value: float, like: Tensor) -> Tensor:
    """() float32 on the device of `like`."""
    if is_dynamo_compiling() and not is_constant(value):
        # a product is what torch makes of tensors alone; it would make `value` of a fill a constant
        return like.new_ones((), dtype=torch.float32) * value
    return like.new_full((), value, dtype=torch.float32)


def as_numbers(values: Sequence[float | Tensor]) -> Tensor:
    """(n,) float64 on the CPU, where a kernel's launch reads them."""
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([x if isinstance(x, Tensor) else one * x for x in values])


def float_places(function: Callable[..., Any]) -> list[int]:
    """Positions of the parameters that are annotated as float."""
    parameters = inspect.signature(function).parameters.values()
    return [i for i, parameter in enumerate(parameters) if parameter.annotation is float]


def put(arguments: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The arguments with others at some places."""
    result = list(arguments)
    for place, value in zip(places, values, strict=True):
        result[place] = value
    return result


def of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with one more parameter, the tensor of the numbers at its float places."""
    places = float_places(function)
    signature = inspect.signature(function)
    numbers = inspect.Parameter(
        "numbers", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor
    )

    def call(*arguments: Any) -> Any:
        return function(*put(arguments[:-1], places, arguments[-1].tolist()))

    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), numbers]
    )
    return call
