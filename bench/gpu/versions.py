"""What a run runs on: GPU, driver, compilers, packages."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from warpo.bench.environment import environment, gpu_state, processor
from warpo.bench.gpu.results import record

PACKAGES = ("triton", "transformers", "numpy", "pydantic", "pybind11", "setuptools", "pytest")
COMMANDS = (("nvidia-smi",), ("nvcc", "--version"), ("g++", "--version"))


def gpu() -> dict[str, Any]:
    """Of the GPU that torch uses: name, capability, sizes in bytes, state; empty without one."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties()
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "shared_memory_bytes": getattr(found, "shared_memory_per_block_optin", None),
        **gpu_state(),
    }


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def printed(command: Sequence[str]) -> str:
    """What a command says of itself; why not, where it cannot."""
    if shutil.which(command[0]) is None:
        return f"{command[0]}: not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]}: no answer in 8 s"
    return done.stdout + done.stderr


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m warpo.bench.gpu.versions", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args(words)
    found = gpu()
    common = environment(["warpo", "bench", "gpu"], found.get("gpu", processor()))
    row = {
        **common,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "cuda": torch.version.cuda,
        "packages": packages(),
        **found,
    }
    record(args.out, "versions", **row)
    print(row)
    for command in COMMANDS:
        print(printed(command), flush=True)
    return 0 if found or args.device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
