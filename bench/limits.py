"""What this machine can do at most, measured in the same run as what is compared with it."""

import statistics
from collections.abc import Mapping

import torch

from warpo.bench.operation import Work
from warpo.bench.timing import Call, measure
from warpo.kernels import ops

_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
_MATRIX = {"cpu": 1536, "cuda": 8192}
# In the second-level cache of a CPU; large enough to fill a GPU.
_EXP = {"cpu": 1 << 18, "cuda": 1 << 26}


def limits(device: str, budget_s: float) -> dict[str, float]:
    """Of a device, in units a second.

    read, copy      bytes, of a sum of float32 and of a copy; the copy counts both directions
    matrix_float32, matrix_bfloat16     FLOP, of a square matrix product
    exp             exponentials of float32: of torch.exp, or of our log-sum-exp where that does
                    more, both on data in the caches
    """
    source = torch.ones(_ELEMENTS[device], device=device)
    target = torch.empty_like(source)
    small = torch.randn(_EXP[device], device=device)
    out, rows = torch.empty_like(small), small.view(-1, 1 << 12)
    targets = torch.zeros(len(rows), dtype=torch.int64, device=device)
    side = _MATRIX[device]
    calls: dict[str, Call] = {
        "read": lambda: source.sum(),
        "copy": lambda: target.copy_(source),
        "exp": lambda: torch.exp(small, out=out),
        "log-sum-exp": lambda: ops.logprobs(rows, targets),
    }
    amounts = {"read": 4 * source.numel(), "copy": 8 * source.numel()}
    amounts |= {"exp": small.numel(), "log-sum-exp": small.numel()}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(side, side, device=device).to(dtype)
        name = f"matrix_{str(dtype).removeprefix('torch.')}"
        calls[name] = lambda square=square: square @ square  # type: ignore[misc]
        amounts[name] = 2 * side**3
    times = measure(device, calls, budget_s)
    rates = {name: 1e3 * amounts[name] / statistics.median(times[name]) for name in calls}
    return rates | {"exp": max(rates["exp"], rates.pop("log-sum-exp"))}


def bound(work: Work, dtype: str, found: Mapping[str, float]) -> tuple[str, float]:
    """What limits the work, and the milliseconds that it takes at least."""
    traffic = "copy" if work.written else "read"
    matrix = "matrix_float32" if dtype == "float32" else "matrix_bfloat16"
    times = {
        traffic: (work.read + work.written) / found[traffic],
        matrix: work.flops / found[matrix],
        "exp": work.exps / found["exp"],
    }
    name = max(times, key=lambda key: times[key])
    return name, 1e3 * times[name]
