"""Timing of calls, and the peak of their memory."""

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

Call = Callable[[], object]
WARM_UP_S = 0.05
TURNS = 5
# Elements that flush the caches. On a GPU to write them takes longer than to launch what is timed,
# so that it does not wait for the host.
_FLUSHED = {"cpu": 1 << 26, "cuda": 1 << 28}


def measure(
    device: str, calls: dict[str, Call], budget_s: float, cold: bool = False, turns: int = TURNS
) -> dict[str, list[float]]:
    """Milliseconds of each call. The calls take turns of equal time, so that drift of the machine
    hits all of them alike.

    Args:
        budget_s: seconds for each call, after a warm-up; at least one run a turn, at most 500.
        cold: a buffer larger than the caches is written before each run. On a GPU it always is.
        turns: of each call.
    """
    timer = _cuda_ms if device == "cuda" else _cpu_ms
    flush = torch.empty(_FLUSHED[device], device=device) if cold or device == "cuda" else None
    for call in calls.values():
        _warm_up(partial(timer, call), min(WARM_UP_S, budget_s / 2))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start, runs = time.perf_counter(), 0
            while runs == 0 or (
                runs < 500 // turns and time.perf_counter() - start < budget_s / turns
            ):
                if flush is not None:
                    flush.zero_()
                times[name].append(timer(call))
                runs += 1
    return times


def _warm_up(call: Call, seconds: float) -> None:
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < seconds:
        call()


def spread(times: Sequence[float]) -> dict[str, float | int]:
    """Median, p20 and p80 of milliseconds, and how many there are, as the rows of results have
    them.
    """
    ordered = sorted(times)
    return {
        "ms": statistics.median(ordered),
        "p20_ms": ordered[len(ordered) // 5],
        "p80_ms": ordered[len(ordered) * 4 // 5],
        "runs": len(ordered),
    }


def _cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graph_ms(call: Call, budget_s: float) -> float | None:
    """Median of replays of a CUDA graph of the call, which leaves out the host; None where it
    cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    return statistics.median(measure("cuda", {"graph": graph.replay}, budget_s)["graph"])


def host_us(device: str, call: Call) -> float:
    """Microseconds of a call whose tensors are tiny, without waiting for the device."""
    _warm_up(call, WARM_UP_S / 5)
    if device == "cuda":
        torch.cuda.synchronize()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(5):
            call()
        times.append((time.perf_counter() - start) / 5)
        if device == "cuda":
            torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def peak_bytes(device: str, call: Call) -> int:
    """The most memory that torch had allocated during a call, beyond what was before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        _quiet(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler writes to the standard error of the process."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
