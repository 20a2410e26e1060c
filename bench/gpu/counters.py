"""Hardware counters of the kernels that matter most, read by Nsight Compute: bytes of device
memory, hit rate of the L2, occupancy, and why warps wait.

A process of ncu for each, in order of importance, so that a stop leaves those before it.
"""

import argparse
import csv
import glob
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from warpo.bench.gpu.goals import GOALS, Goal
from warpo.bench.gpu.results import record
from warpo.bench.suite import call_of

_STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "us": "gpu__time_duration.sum",
    "read_bytes": "dram__bytes_read.sum",
    "written_bytes": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "local_sectors": "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum",
    "stalled_memory": _STALLED.format("long_scoreboard"),
    "stalled_barrier": _STALLED.format("barrier"),
    "stalled_queue": _STALLED.format("lg_throttle"),
    "stalled_math": _STALLED.format("math_pipe_throttle"),
    "stalled_shared": _STALLED.format("short_scoreboard"),
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "shared_bytes": "launch__shared_mem_per_block",
}
# The loss from logits first, whose second read of a row is in question.
KERNELS = (
    "policy_loss_from_logits",
    "logprobs_and_entropy",
    "logprobs",
    "gae",
    "policy_loss",
    "adamw_publish",
    "fingerprint",
)
LIMIT_S = 25.0


def find_ncu() -> str | None:
    places = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
    found = [path for place in places for path in sorted(glob.glob(place), reverse=True)]
    return shutil.which("ncu") or (found[0] if found else None)


def goal_of(operation: str) -> Goal:
    """The first case of an operation."""
    return next(goal for goal in GOALS if goal.operation == operation)


def launch(operation: str, device: str) -> None:
    """The case once to load it, then once between the marks that ncu looks for."""
    point = goal_of(operation).point(device)
    inputs = point.operation.make(device, point.dtype, point.sizes)
    call = call_of(
        lambda given: point.operation.ours(given, device),
        inputs,
        point.operation.leaves,
        point.mode,
    )
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    print(point.title, "launched", flush=True)


def command(ncu: str, program: Sequence[str]) -> list[str]:
    """The clocks stay as they are: those that ncu would set are not those that were timed."""
    return [
        *(ncu, "--clock-control", "none", "--profile-from-start", "off"),
        *("--metrics", ",".join(METRICS.values())),
        *("--csv", "--page", "raw", "--print-units", "base", *program),
    ]


def parse(text: str) -> list[dict[str, Any]]:
    """A row for each kernel of ncu's output: below the names of the columns are their units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found = []
    for line in list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]:
        row: dict[str, Any] = {"kernel": line.get("Kernel Name", "")[:120]}
        for name, metric in METRICS.items():
            number = (line.get(metric) or "").replace(",", "")
            try:
                row[name] = float(number) / (1e3 if name == "us" else 1)  # ncu: ns
            except ValueError:
                row[name] = None
        found.append(row)
    return found


def profile(operation: str, ncu: str, out: Path) -> bool:
    """Whether its kernels have rows."""
    module = [sys.executable, "-m", "warpo.bench.gpu.counters", "--out", str(out)]
    full = command(ncu, [*module, "--launch", operation])
    try:
        done = subprocess.run(full, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"{operation}: no answer of ncu in {LIMIT_S:.0f} s", flush=True)
        return False
    print(done.stdout, done.stderr, flush=True)
    rows = parse(done.stdout)
    for row in rows:
        record(out, "ncu", operation=operation, **row)
    return bool(rows) and done.returncode == 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m warpo.bench.gpu.counters", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--launch", choices=KERNELS, help="only launch it, for ncu")
    args = parser.parse_args(words)
    if args.launch:
        launch(args.launch, args.device)
        return 0
    if args.device == "cpu":  # without counters: that the programs run
        for operation in KERNELS:
            launch(operation, "cpu")
        return 0
    ncu = find_ncu()
    if ncu is None:
        print("ncu: not found")
        return 1
    return 0 if all([profile(operation, ncu, args.out) for operation in KERNELS]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
