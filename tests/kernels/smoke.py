"""One small call of each operation of the contract, forward and backward, against the reference;
and what only a GPU shows: a stream that is not torch's default, a thread that is not the main one,
and a first launch that is captured into a CUDA graph, in a process that has launched nothing else.

    python -m tests.kernels.smoke --device cuda --out DIR
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Relative to the largest value, or to 1: float32 arithmetic in another order.
TOLERANCE = 1e-4

Outcome = tuple[list, list]


def errors(found: Outcome, wanted: Outcome) -> float:
    """The largest error of results and gradients."""
    worst = 0.0
    for a, b in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        if a.numel():
            a, b = (x.double().nan_to_num(7e7) for x in (a, b))
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1)))
    return worst


def on_a_stream(call: Callable[[], Outcome]) -> Outcome:
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def on_a_thread(call: Callable[[], Outcome]) -> Outcome:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def capture(call: Callable[[], Outcome]) -> tuple[Any, Outcome]:
    """The graph, and what a replay of it fills."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


def captured(call: Callable[[], Outcome]) -> Outcome:
    import torch

    graph, found = capture(call)
    graph.replay()
    torch.cuda.synchronize()
    return found


def checks(device: str) -> dict[str, Callable[[Callable[[], Outcome]], Outcome]]:
    """The ways of calling, by name."""
    ways = {"call": lambda call: call(), "other thread": on_a_thread}
    return ways if device == "cpu" else ways | {"other stream": on_a_stream}


def tried(device: str, capture: bool, out: Path) -> int:
    """How many failed. A row for each operation and way of calling."""
    import torch

    from tests.kernels.operations import OPERATIONS
    from tests.kernels.test_contract import run
    from warpo.bench.gpu.results import record

    failures = 0
    ways = {"first launch in a graph": captured} if capture else checks(device)
    if capture:  # cuBLAS and the allocator start outside
        torch.mm(torch.ones(8, 8, device=device), torch.ones(8, 8, device=device))
    for operation in OPERATIONS:
        tensors = operation.tensors()
        for name, way in ways.items():
            row = {"operation": operation.name, "backend": device, "way": name}
            try:
                found = way(lambda: run(operation, tensors, device))  # noqa: B023
                row["error"] = errors(found, run(operation, tensors, "reference"))
                good = row["error"] <= TOLERANCE
            except Exception as error:
                good, row["problem"] = False, f"{type(error).__name__}: {error}"[:500]
            failures += not good
            record(out, "smoke", passed=good, **row)
            if not good:
                print("FAILED", row, flush=True)
    return failures


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.smoke", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captured", action="store_true", help="only the capture")
    args = parser.parse_args(words)
    os.environ["WARPO_TEST_DEVICE"] = args.device
    failures = tried(args.device, args.captured, args.out)
    if args.device == "cuda" and not args.captured:
        again = [sys.executable, "-m", "tests.kernels.smoke", *words, "--captured"]
        failures += subprocess.run(again, check=False).returncode != 0
    print(f"smoke: {failures} failures", flush=True)
    return min(1, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
