"""Installs the wheels that were carried to this machine, and builds the extension modules in place,
for this Python and for the architecture of this GPU alone.

Nothing is installed into the Python environment, which may be read-only: wheels go to
.wheels/site, and `warpo` is found through a folder of links, both on the PYTHONPATH.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from warpo.bench.gpu.results import record

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".wheels"
SITE = WHEELS / "site"
"""Where the wheels are installed."""


def install() -> bool:
    """Whether the wheels, if there are any, could be installed."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        return True
    options = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade")
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
    return not subprocess.run([*command, "--target", str(SITE), *wheels], check=False).returncode


def module(name: str) -> Path:
    """Where the extension module of this Python lies, once it is built."""
    return ROOT / "kernels" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m warpo.bench.gpu.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args(words)
    good = install()
    variables = {"WARPO_CUDA": "0"}
    if args.device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        variables = {"WARPO_CUDA_ARCHS": f"{major}{minor}"}
    start = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False)
    seconds = round(time.monotonic() - start, 1)
    built = module("_cuda" if args.device == "cuda" else "_cpu")
    record(args.out, "build", seconds=seconds, status=done.returncode, wheels=good, **variables)
    if done.returncode == 0 and args.device == "cuda":
        shutil.copy2(built, args.out)  # to be carried to where `make gpu-sanitize` runs
    return 0 if good and done.returncode == 0 and built.exists() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
