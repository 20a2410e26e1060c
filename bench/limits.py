"""Peak rates of this machine, measured in the same run as the rows compared with them."""

import math
import statistics
from collections.abc import Mapping

import torch

from warpo.bench.operation import Work
from warpo.bench.timing import Call, measure
from warpo.kernels import ops

# Bytes over which reads and copies run: in the caches of a CPU, around their end, and in memory.
# Smaller ones would measure torch's calls. On a GPU the cache is flushed before each call.
_WORKING_SETS = {"cpu": (1 << 20, 1 << 22, 1 << 24, 1 << 25, 1 << 27), "cuda": (1 << 31,)}
_MATRIX = {"cpu": 1536, "cuda": 8192}
# In the caches of a CPU; large enough to fill a GPU.
_EXP = {"cpu": (16, 1 << 17), "cuda": (1 << 12, 1 << 15)}


def limits(device: str, budget_s: float, cold: bool = False) -> dict[str, float]:
    """Measure the rates of a device, in units per second.

    read_NMiB, copy_NMiB    bytes, of a sum of float32 and of a copy, which counts both directions,
                            over a working set of N MiB
    matrix_float32, matrix_bfloat16     FLOP, of a square matrix product
    exp                     exponentials: of torch.exp, or of our log-sum-exp where that does more,
                            on data in the caches

    Args:
        budget_s: seconds for each of them.
        cold: what is compared with them has its data in memory, not in the caches.
    """
    calls: dict[str, Call] = {}
    amounts: dict[str, float] = {}
    for size in _WORKING_SETS[device][-1 if cold else 0 :]:
        whole, half = (torch.ones(size // n, device=device) for n in (4, 8))
        target = torch.empty_like(half)
        calls[_name("read", size)] = lambda whole=whole: whole.sum()  # type: ignore[misc]
        calls[_name("copy", size)] = lambda a=target, b=half: a.copy_(b)  # type: ignore[misc]
        amounts |= {_name(traffic, size): size for traffic in ("read", "copy")}
    side = _MATRIX[device]
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(side, side, device=device).to(dtype)
        name = f"matrix_{str(dtype).removeprefix('torch.')}"
        calls[name] = lambda square=square: square @ square  # type: ignore[misc]
        amounts[name] = 2 * side**3
    exponentials = _exponentials(device)
    count = math.prod(_EXP[device])
    times = measure(device, calls | exponentials, budget_s)
    rates = {name: 1e3 * amounts[name] / statistics.median(times[name]) for name in calls}
    fastest = min(statistics.median(times[name]) for name in exponentials)
    return rates | {"exp": 1e3 * count / fastest}


def _exponentials(device: str) -> dict[str, Call]:
    rows = torch.randn(_EXP[device], device=device)
    out, low = torch.empty_like(rows), rows.bfloat16()
    targets = torch.zeros(len(rows), dtype=torch.int64, device=device)
    return {
        "exp": lambda: torch.exp(rows, out=out),
        "log-sum-exp": lambda: ops.logprobs(rows, targets),
        "log-sum-exp, bfloat16": lambda: ops.logprobs(low, targets),
    }


def _name(traffic: str, size: int) -> str:
    return f"{traffic}_{size >> 20}MiB"


def bound(work: Work, dtype: str, found: Mapping[str, float]) -> tuple[str, float]:
    """Name of the limit of the work, and the least milliseconds that it takes."""
    traffic = "copy" if work.written else "read"
    moved = work.read + work.written
    matrix = "matrix_float32" if dtype == "float32" else "matrix_bfloat16"
    times = {
        # what is written may lie where it was read
        traffic: moved / _bandwidth(traffic, max(work.read, work.written), found),
        matrix: work.flops / found[matrix],
        "exp": work.exps / found["exp"],
    }
    name = max(times, key=lambda key: times[key])
    return name, 1e3 * times[name]


def _bandwidth(traffic: str, working_set: int, found: Mapping[str, float]) -> float:
    """The best rate over working sets not below the largest measured one that this one fills."""
    rates = {
        int(name.removeprefix(f"{traffic}_").removesuffix("MiB")) << 20: rate
        for name, rate in found.items()
        if name.startswith(f"{traffic}_")
    }
    least = max((size for size in rates if size <= working_set), default=0)
    return max(rate for size, rate in rates.items() if size >= least)
