"""The facts by which a reader judges and repeats a run, and the layout of printed tables."""

import datetime
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def environment(command: Sequence[str], machine: str) -> dict[str, str | int]:
    """Fields of every row of a run: its command, machine, versions, commit and date."""
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"


def gpu_state() -> dict[str, str]:
    """Clocks in MHz, power in watts and temperature of the GPU at this moment, as its driver says;
    empty where it does not.
    """
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[torch.cuda.current_device()].split(",")
    return {name: value.strip() for name, value in zip(names, values, strict=True)}


def processor() -> str:
    """Name and number of the CPU cores."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"{model}, {sum(line.startswith('processor') for line in lines)} cores"


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Cells in columns; the first `left` columns are text and start at the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
