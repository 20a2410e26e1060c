"""Time every operation on one device, beside PyTorch, torch.compile and, where `make peers` has
installed them, TRL and verl, and beside the bandwidth of the same run.

    python -m warpo.bench.kernels --device cpu --out bench/results/my-machine

Prints a table of times and one of goals. Writes OUT/kernels.jsonl, one row for each operation, size
and provider, with machine, versions, date and command. A backend that is wrong against float64 gets
no time.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from warpo.bench import peers
from warpo.bench.case import Call, Case
from warpo.bench.cases import cases
from warpo.bench.environment import aligned, environment, processor
from warpo.engine.environment import keep_freed_memory
from warpo.kernels import dispatch

# Largest error against float64, relative to the largest value: float32 arithmetic with a bfloat16
# gradient rounded once.
TOLERANCE = 5e-3
WARM_UP_S, BUDGET_S = 0.2, 1.5


def measure(
    device: str, calls: dict[str, Call], budget_s: float = BUDGET_S
) -> dict[str, list[float]]:
    """Milliseconds of each call; the providers take turns, so that drift hits all of them alike."""
    timer = _cuda_ms if device == "cuda" else _cpu_ms
    flush = torch.empty(1 << 26, device=device) if device == "cuda" else None
    for call in calls.values():
        start = time.perf_counter()
        call()
        while time.perf_counter() - start < WARM_UP_S:
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while len(times[next(iter(times))]) < 3 or (
        time.perf_counter() - start < budget_s * len(calls) and len(times[next(iter(times))]) < 200
    ):
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()  # the second-level cache holds the inputs of nobody
            times[name].append(timer(call))
    return times


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


def bandwidths(device: str) -> dict[str, float]:
    """GB/s of a copy, bytes read and written counted, and of a sum, which only reads."""
    count = 1 << (30 if device == "cuda" else 27)
    source, target = (torch.empty(count // 4, device=device).fill_(1) for _ in range(2))
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
    }
    times = measure(device, calls)
    moved = {"copy": 2 * count, "read": count}
    return {name: moved[name] / statistics.median(times[name]) / 1e6 for name in calls}


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


def rows_of(case: Case, device: str, limits: dict[str, float]) -> Iterator[dict]:
    """A row for each provider; one that is wrong, fails or is missing has the reason in place of a
    time.
    """
    calls, problems = {}, {}
    for name, make in case.providers.items():
        try:
            error = case.error(name) if name in dispatch.BACKENDS else 0.0
            call = make()
            call()
        except (RuntimeError, ValueError) as failure:
            problems[name] = f"{type(failure).__name__}: {failure}"
            continue
        if error > TOLERANCE:
            problems[name] = f"wrong: error {error:.1e} against float64"
        else:
            calls[name] = call
    times = measure(device, calls)
    for name in case.providers:
        row: dict[str, Any] = {"operation": case.name, "size": case.size, "provider": name}
        if name in problems:
            yield row | {"problem": problems[name]}
            continue
        ordered = sorted(time / case.repeat for time in times[name])
        median = statistics.median(ordered)
        row |= {
            "ms": median,
            "p20_ms": ordered[len(ordered) // 5],
            "p80_ms": ordered[len(ordered) * 4 // 5],
            "runs": len(ordered),
            "gb_per_s": case.traffic / median / 1e6,
            "bound": case.bound,
            "share_of_bound": case.traffic / median / 1e6 / limits[case.bound],
        }
        if case.tokens:
            row["peak_bytes"] = peak_bytes(device, calls[name])
            row["peak_bytes_a_token"] = row["peak_bytes"] / case.tokens
        yield row


def described(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return (
        environment("warpo.bench.kernels", name)
        | {"triton": importlib.metadata.version("triton")}
        | peers.versions()
    )


def table_of(rows: list[dict]) -> str:
    """The rows as aligned text."""
    lines = [
        [
            "operation",
            "size",
            "provider",
            "ms",
            "p20 to p80",
            "of bound",
            "x eager",
            "bytes a token",
        ]
    ]
    eager = {(r["operation"], r["size"]): r.get("ms") for r in rows if r["provider"] == "eager"}
    for row in rows:
        line = [row["operation"], row["size"], row["provider"]]
        if "problem" in row:
            lines.append([*line, row["problem"][:60], "", "", "", ""])
            continue
        base = eager.get((row["operation"], row["size"]))
        lines.append(
            [
                *line,
                f"{row['ms']:.4g}",
                f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
                f"{row['share_of_bound']:.0%} {row['bound']}",
                f"{base / row['ms']:.1f}" if base else "",
                f"{row['peak_bytes_a_token']:.0f}" if "peak_bytes_a_token" in row else "",
            ]
        )
    return aligned(lines, 3)


def goals_of(case: Case, rows: list[dict]) -> Iterator[dict]:
    """What the backend "cpu" is held to, and what it reached in this run."""
    by_provider = {row["provider"]: row for row in rows}
    mine = by_provider["cpu"]
    for against, goal in case.goals.items():
        reached = None
        if "problem" not in mine:
            if against == "microseconds":
                reached = 1e3 * mine["ms"]
            elif against == "bytes a token":
                reached = mine["peak_bytes_a_token"]
            elif against == case.bound:
                reached = mine["share_of_bound"]
            elif "ms" in by_provider[against]:
                reached = by_provider[against]["ms"] / mine["ms"]
        at_most = against in ("microseconds", "bytes a token")
        met = reached is not None and (reached <= goal if at_most else reached >= goal)
        yield {
            "operation": case.name, "size": case.size, "against": against, "goal": goal,
            "at_most": at_most, "reached": reached, "met": met,
        }  # fmt: skip


def goals_table(goals: list[dict]) -> str:
    lines = [["operation", "size", "against", "goal", "reached", ""]]
    for goal in goals:
        bound = f"{'<=' if goal['at_most'] else '>='} {goal['goal']:.4g}"
        reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.4g}"
        lines.append([goal["operation"], goal["size"], goal["against"], bound, reached,
                      "met" if goal["met"] else "missed"])  # fmt: skip
    return aligned(lines, 3)


def run(device: str, out: Path, groups: list[Callable[[], list[Case]]], only: str) -> None:
    """Time all cases; rows are written as they come, so that an interrupt keeps them."""
    limits = bandwidths(device)
    common = described(device) | {f"{name}_gb_per_s": x for name, x in limits.items()}
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    goals: list[dict] = []
    with (out / "kernels.jsonl").open("w", encoding="utf-8") as file:
        for number, group in enumerate(groups, 1):
            for case in group():
                if only not in case.name:
                    continue
                print(f"[{number}/{len(groups)}] {case.name} {case.size}", file=sys.stderr)
                found = list(rows_of(case, device, limits))
                rows += found
                goals += goals_of(case, found) if case.goals else []
                file.writelines(json.dumps(row | common) + "\n" for row in found)
                file.flush()
    bandwidth = ", ".join(f"{name} {value:.0f} GB/s" for name, value in limits.items())
    print(f"bandwidth in this run: {bandwidth}\n\n{table_of(rows)}")
    if goals:
        print(f"\n{goals_table(goals)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="operations with TEXT in the name"
    )
    parser.add_argument(
        "--fresh-memory",
        action="store_true",
        help="CPU: return freed memory to the system, as glibc does; page faults then count",
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --device cpu")
    if not args.fresh_memory:
        keep_freed_memory()
    run(args.device, args.out, cases(args.device), args.only)


if __name__ == "__main__":
    main()
