"""One row for each operation, size, dtype, mode and provider."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from warpo.bench.correctness import TOLERANCE, Exact, exact_of
from warpo.bench.limits import bound
from warpo.bench.operation import (
    Function,
    Inputs,
    Operation,
    Provider,
    Sizes,
    copied,
    cotangents,
    results_of,
    with_gradients,
)
from warpo.bench.timing import Call, graph_ms, host_us, measure, peak_bytes, spread

# Elements of inputs that are compared with float64 as a whole, where a part would be compiled anew.
WHOLE = 1 << 24
# On a GPU, calls that take less are timed from a CUDA graph, too.
GRAPH_BELOW_MS = 0.1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of the run of a suite.

    Attributes:
        limits: of `limits.limits`.
        budget_s: of timing each provider in each mode.
        cold: whether caches are flushed before each run.
        wanted: whether a provider is measured at a point, by its name.
    """

    device: str
    limits: Mapping[str, float]
    budget_s: float
    cold: bool
    wanted: Callable[["Point", str], bool]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One operation at one size, in one dtype and mode."""

    operation: Operation
    sizes: Sizes
    dtype: torch.dtype
    mode: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        sizes = " x ".join(f"{self.sizes[name]}" for name in self.operation.sizes)
        return f"{self.operation.name} {sizes} {self.dtype_name} {self.mode}"


def providers_of(operation: Operation, device: str) -> dict[str, Provider]:
    """Return the providers to time: our backends, PyTorch, torch.compile, other libraries."""
    backends = ("cpu",) if device == "cpu" else ("triton", "cuda")
    found = {name: Provider(load=partial(_backend, operation, name)) for name in backends}
    eager = operation.eager
    if eager is not None:
        found["eager"] = Provider(load=lambda: eager)
        if operation.compiles:
            found["compile"] = Provider(load=partial(_compiled, eager), one_shape=True)
    return found | dict(operation.others)


def _compiled(eager: Function) -> Function:
    torch._dynamo.reset()  # or, after eight shapes of one function, it would run uncompiled
    return torch.compile(eager, dynamic=False)


def _backend(operation: Operation, name: str) -> Function:
    return lambda inputs: operation.ours(inputs, name)


def rows_of(point: Point, plan: Plan) -> Iterator[dict[str, Any]]:
    """A row for each provider. One that is wrong, fails or is missing has the reason in place of a
    time.
    """
    operation = point.operation
    inputs = operation.make(plan.device, point.dtype, point.sizes)

    @cache
    def exact(whole: bool) -> Exact:
        return exact_of(operation, inputs if whole else operation.part(inputs), point.mode)

    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, provider in providers_of(operation, plan.device).items():
        if not plan.wanted(point, name) or point.mode not in provider.modes:
            continue
        rows[name] = row = _described(point, name)
        try:
            function = provider.load()
            whole = provider.one_shape and _numel(inputs) <= WHOLE
            row["error"] = exact(whole).error_of(function)
            if not row["error"] <= TOLERANCE[point.dtype]:
                row["problem"] = f"wrong: {row['error']:.1e} off float64"
                continue
            mine = copied(inputs) if provider.own_inputs else inputs
            calls[name] = call_of(function, mine, operation.leaves, point.mode)
            calls[name]()
            row["peak_bytes"] = peak_bytes(plan.device, calls[name])
            if not provider.one_shape:
                row["host_us"] = _host_us(function, point, plan)
        except Exception as error:  # a provider of somebody else may raise anything
            calls.pop(name, None)
            row["problem"] = f"{type(error).__name__}: {error}".replace("\n", " ")
    times = measure(plan.device, calls, plan.budget_s, plan.cold) if calls else {}
    for name, row in rows.items():
        yield row | (_timed(point, plan, times[name], calls[name]) if name in times else {})


def _described(point: Point, provider: str) -> dict[str, Any]:
    return {
        "operation": point.operation.name,
        "sizes": dict(point.sizes),
        "dtype": point.dtype_name,
        "mode": point.mode,
        "provider": provider,
    }


def _timed(point: Point, plan: Plan, times: Sequence[float], call: Call) -> dict[str, Any]:
    work = point.operation.work(point.sizes, point.dtype.itemsize, point.mode)
    name, limit_ms = bound(work, point.dtype_name, plan.limits)
    row: dict[str, Any] = spread(times)
    row |= {
        "limit": name,
        "limit_ms": limit_ms,
        "share_of_limit": limit_ms / row["ms"],
        "cache": "cold" if plan.cold or plan.device == "cuda" else "warm",
    }
    if plan.device == "cuda" and point.mode == "fwd" and row["ms"] < GRAPH_BELOW_MS:
        row["graph_ms"] = graph_ms(call, plan.budget_s)
    return row


def _host_us(function: Callable, point: Point, plan: Plan) -> float:
    """The time of a call whose tensors are tiny."""
    operation = point.operation
    tiny = operation.make(plan.device, point.dtype, operation.tiny)
    return host_us(plan.device, call_of(function, tiny, operation.leaves, point.mode))


def call_of(function: Callable, inputs: Inputs, leaves: tuple[str, ...], mode: str) -> Call:
    """The call to time: the function on these inputs in this mode."""
    if mode == "fwd":
        plain = inputs | {name: inputs[name].detach() for name in leaves}

        def forward() -> None:
            with torch.no_grad():
                function(plain)

        return forward
    mine = with_gradients(inputs, leaves)
    wanted = [mine[name] for name in leaves]
    outputs = [r for r in results_of(function(mine)) if r.requires_grad]
    incoming = cotangents(outputs)

    def backward() -> None:
        torch.autograd.grad(outputs, wanted, incoming, retain_graph=True, allow_unused=True)

    def both() -> None:
        results = [r for r in results_of(function(mine)) if r.requires_grad]
        torch.autograd.grad(results, wanted, incoming, allow_unused=True)

    return backward if mode == "bwd" else both


def _numel(inputs: Inputs) -> int:
    return max(value.numel() for value in inputs.values() if isinstance(value, Tensor))
