"""One operation as the suite sees it: its inputs, its providers, and the least work that it
takes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Function = Callable[[Inputs], Any]
Sizes = Mapping[str, int]

MODES = ("fwd", "bwd", "fwd+bwd")


class Missing(RuntimeError):
    """A provider that is not installed, or does not do this; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a call has to do.

    Attributes:
        read, written: bytes.
        flops: of matrix products, a multiplication with its addition counted as two.
        exps: exponentials.
    """

    read: int = 0
    written: int = 0
    flops: int = 0
    exps: int = 0


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Somebody's function for the operation.

    Attributes:
        load: gives the function, or raises `Missing`.
        own_inputs: it writes to its inputs, so it gets a copy.
        modes: in which it is timed.
        one_shape: other shapes than the one that is timed cost seconds: it is compared with float64
            at that one where memory allows, and its host cost is left out.
    """

    load: Callable[[], Function]
    own_inputs: bool = False
    modes: tuple[str, ...] = MODES
    one_shape: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of `warpo.kernels.ops`.

    Attributes:
        name: in `ops`.
        sizes: names of its sizes, in the order of its inputs' dimensions.
        tiny: sizes at which only the cost of the call counts.
        make: make(device, dtype, sizes) gives random inputs.
        leaves: names of the inputs that take gradients; none: the mode is "fwd" alone.
        dtypes: of the large input.
        ours: ours(inputs, backend).
        eager: what users write in plain PyTorch; torch.compile gets the same.
        exact: the definition, on inputs in float64.
        others: by provider, functions of other libraries.
        work: work(sizes, bytes of an element, mode).
        part: a few rows of the inputs, on which results and gradients are compared with `exact`.
        mask: name of the input that says which slots of results and gradients count; libraries
            differ in what they put in the others.
        compiles: whether torch.compile is worth waiting for.
    """

    name: str
    sizes: tuple[str, ...]
    tiny: Sizes
    make: Callable[[str, torch.dtype, Sizes], Inputs]
    leaves: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    ours: Callable[[Inputs, str], Any]
    eager: Function | None
    exact: Function
    others: Mapping[str, Provider] = field(default_factory=dict)
    work: Callable[[Sizes, int, str], Work]
    part: Callable[[Inputs], Inputs]
    mask: str | None = None
    compiles: bool = True

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else ("fwd",)


def first_rows(count: int) -> Callable[[Inputs], Inputs]:
    """A `part` of inputs whose tensors all have a row for each item in dimension 0."""

    def part(inputs: Inputs) -> Inputs:
        return {
            name: value[:count] if isinstance(value, Tensor) and value.dim() else value
            for name, value in inputs.items()
        }

    return part


def in_double(inputs: Inputs) -> Inputs:
    """The floating-point inputs in float64."""
    return _of_tensors(inputs, lambda x: x.detach().double() if x.is_floating_point() else x)


def copied(inputs: Inputs) -> Inputs:
    """Copies of the tensors."""
    return _of_tensors(inputs, Tensor.clone)


def _of_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """The function of each tensor, alone or in a list."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(x) for x in value]
        return function(value) if isinstance(value, Tensor) else value

    return {name: of(value) for name, value in inputs.items()}


def results_of(returned: Any) -> list[Tensor]:
    """Results of a function as a list of tensors."""
    if isinstance(returned, Tensor):
        return [returned]
    return [result for result in returned if isinstance(result, Tensor)]


def with_gradients(inputs: Inputs, leaves: tuple[str, ...]) -> Inputs:
    """The same inputs, the leaves as leaves of a graph of their own."""
    return inputs | {name: inputs[name].detach().requires_grad_() for name in leaves}


def cotangents(results: list[Tensor]) -> list[Tensor]:
    """Gradients of the results, as a loss on top of them would send: 1 for a loss."""
    return [torch.ones_like(r) if r.dim() == 0 else torch.randn_like(r) for r in results]
