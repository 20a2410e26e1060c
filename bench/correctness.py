"""Check of a provider: its results and gradients against those in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from warpo.bench.operation import (
    Inputs,
    Operation,
    copied,
    cotangents,
    in_double,
    results_of,
    with_gradients,
)

# Largest error against float64, relative to the largest value: float32 arithmetic; those who keep
# logits in bfloat16 have them to 1/256, of which exp makes a share of the gradient.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The definition on some inputs, in float64.

    Attributes:
        leaves: names of the inputs that take gradients; none forward.
        incoming: gradients of those results that have one, which both sides get.
        gradients: of the leaves.
    """

    inputs: Inputs
    leaves: tuple[str, ...]
    mask: Tensor | None
    results: list[Tensor]
    incoming: list[Tensor]
    gradients: tuple[Tensor, ...]

    def error_of(self, function: Callable) -> float:
        """Largest error of results and gradients, relative to the largest value of each. Results
        that the function does not return are not asked for.

        Raises:
            ValueError: a result or gradient has another shape.
        """
        inputs = with_gradients(copied(self.inputs), self.leaves)
        found = results_of(function(inputs))
        errors = [self._error(a, b) for a, b in zip(found, self.results, strict=False)]
        if self.leaves:
            outputs = [a for a, b in zip(found, self.results, strict=False) if b.requires_grad]
            gradients = torch.autograd.grad(
                outputs,
                [inputs[name] for name in self.leaves],
                [g.to(a.dtype) for g, a in zip(self.incoming, outputs, strict=True)],
            )
            errors += [self._error(a, b) for a, b in zip(gradients, self.gradients, strict=True)]
        return max(errors)

    def _error(self, actual: Tensor, expected: Tensor) -> float:
        actual, expected = actual.detach().double(), expected.detach()
        if actual.shape != expected.shape:
            raise ValueError(f"result of shape {tuple(actual.shape)} for {tuple(expected.shape)}")
        if self.mask is not None and self.mask.shape == expected.shape:
            actual, expected = actual[self.mask], expected[self.mask]
        scale = expected.abs().max().clamp(min=1e-30)
        return float(((actual - expected).abs().max() / scale).nan_to_num(torch.inf))


def exact_of(operation: Operation, inputs: Inputs, mode: str) -> Exact:
    """Results and, unless the mode is forward, gradients of these inputs."""
    leaves = operation.leaves if mode != "fwd" else ()
    exact = with_gradients(in_double(inputs), leaves)
    results = results_of(operation.exact(exact))
    incoming: list[Tensor] = []
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        outputs = [result for result in results if result.requires_grad]
        incoming = cotangents(outputs)
        gradients = torch.autograd.grad(outputs, [exact[name] for name in leaves], incoming)
    return Exact(
        inputs=inputs,
        leaves=leaves,
        mask=inputs[operation.mask] if operation.mask else None,
        results=results,
        incoming=incoming,
        gradients=gradients,
    )
