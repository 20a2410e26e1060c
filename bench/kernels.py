"""Time every operation on one device, beside plain PyTorch and the copy bandwidth of the same run.

    python -m warpo.bench.kernels --device cpu --out bench/results/my-machine

Writes OUT/kernels.jsonl, one row for each operation, size and provider, with machine, versions,
date and command. A backend that is wrong against float64 gets no time.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from warpo.bench.cases import Call, Case, cases

# Largest error against float64, relative to the largest value: float32 arithmetic with a bfloat16
# gradient rounded once.
TOLERANCE = 5e-3
BACKENDS = {"cpu": ("eager", "cpu"), "cuda": ("eager", "triton", "cuda")}
WARM_UP_S, BUDGET_S = 0.2, 1.5


def measure(device: str, calls: dict[str, Call]) -> dict[str, list[float]]:
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
        time.perf_counter() - start < BUDGET_S * len(calls) and len(times[next(iter(times))]) < 200
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


def copy_bandwidth(device: str) -> float:
    """GB/s of a copy, bytes read and written counted."""
    count = 1 << (30 if device == "cuda" else 27)
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    source.fill_(1)
    times = measure(device, {"copy": lambda: target.copy_(source)})
    return 2 * count / statistics.median(times["copy"]) / 1e6


def peak_bytes(device: str, call: Call) -> int | None:
    """Memory that a call takes beyond what is allocated; None on the CPU, which does not tell."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows_of(case: Case, device: str, gb_per_s: float) -> Iterator[dict]:
    """A row for each provider; one that is wrong or fails has the reason in place of a time."""
    calls, problems = {}, {}
    for backend in BACKENDS[device]:
        call = case.make(backend)
        try:
            error = 0.0 if backend == "eager" else case.error(backend)
            call()
        except (RuntimeError, ValueError) as failure:
            problems[backend] = f"{type(failure).__name__}: {failure}"
            continue
        if error > TOLERANCE:
            problems[backend] = f"wrong: error {error:.1e} against float64"
        else:
            calls[backend] = call
    times = measure(device, calls)
    for backend in BACKENDS[device]:
        row = {"operation": case.name, "size": case.size, "provider": backend}
        if backend in problems:
            yield row | {"problem": problems[backend]}
            continue
        ordered = sorted(times[backend])
        median = statistics.median(ordered)
        yield row | {
            "ms": median,
            "p20_ms": ordered[len(ordered) // 5],
            "p80_ms": ordered[len(ordered) * 4 // 5],
            "runs": len(ordered),
            "gb_per_s": case.traffic / median / 1e6,
            "share_of_copy": case.traffic / median / 1e6 / gb_per_s,
            "peak_bytes": peak_bytes(device, calls[backend]),
        }


def environment(device: str) -> dict:
    """What a reader needs to judge and repeat the run."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "warpo.bench.kernels", *sys.argv[1:]]),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"{model}, {sum(line.startswith('processor') for line in lines)} cores"


def table_of(rows: list[dict], gb_per_s: float) -> str:
    """The rows as aligned text."""
    lines = [["operation", "size", "provider", "ms", "p20 to p80", "of copy", "x eager"]]
    eager = {(r["operation"], r["size"]): r.get("ms") for r in rows if r["provider"] == "eager"}
    for row in rows:
        line = [row["operation"], row["size"], row["provider"]]
        if "problem" in row:
            lines.append([*line, row["problem"][:40], "", "", ""])
            continue
        base = eager[row["operation"], row["size"]]
        lines.append(
            [
                *line,
                f"{row['ms']:.3f}",
                f"{row['p20_ms']:.3f} to {row['p80_ms']:.3f}",
                f"{row['share_of_copy']:.0%}",
                f"{base / row['ms']:.1f}" if base else "",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([f"copy bandwidth in this run: {gb_per_s:.0f} GB/s", "", *text])


def run(device: str, out: Path, groups: list[Callable[[], list[Case]]]) -> list[dict]:
    """Time all cases; rows are written as they come, so that an interrupt keeps them."""
    common = environment(device)
    gb_per_s = copy_bandwidth(device)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with (out / "kernels.jsonl").open("w", encoding="utf-8") as file:
        for number, group in enumerate(groups, 1):
            for case in group():
                print(f"[{number}/{len(groups)}] {case.name} {case.size}", file=sys.stderr)
                for row in rows_of(case, device, gb_per_s):
                    rows.append(row)
                    file.write(json.dumps(row | {"copy_gb_per_s": gb_per_s} | common) + "\n")
                file.flush()
    print(table_of(rows, gb_per_s))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=list(BACKENDS), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --device cpu")
    run(args.device, args.out, cases(args.device))


if __name__ == "__main__":
    main()
