"""The C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, under their tests.

A read or write outside a tensor, an overflow of int or a misaligned access ends the process and
with it the test. `make sanitize` runs this file alone.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import builds
from tests.kernels.backends import DEVICE

CXX = os.environ.get("CXX", "g++")
# -O1 comes last and so holds: the same accesses are checked, in half the time to compile.
FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
]
# What is registered and traced is the same in every build.
SELECTION = "cpu and not opcheck and not compiles and not host_cost"
# Other builds, and what processes cost.
LEFT_OUT = ("cuda_emulated", "cuda_compile", "triton_compile", "cost", "sanitizers", "cpu_backend")


def find_runtimes() -> list[str]:
    """The runtimes of the sanitizers, which have to be loaded before Python is; none where the
    compiler has none.
    """
    names = [f"lib{name}.so" for name in ("asan", "ubsan")]
    command = shlex.split(CXX)
    try:
        found = [
            subprocess.run(
                [*command, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in names
        ]
    except (OSError, subprocess.CalledProcessError):
        return []
    return found if all(os.path.isabs(path) for path in found) else []


RUNTIMES = find_runtimes()
ENVIRONMENT = {"LD_PRELOAD": " ".join(RUNTIMES), "ASAN_OPTIONS": "detect_leaks=0"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="the sanitizers are for the kernels of the CPU"),
    pytest.mark.skipif(not RUNTIMES, reason=f"{CXX} has no libasan.so and libubsan.so"),
]


@pytest.fixture(scope="session")
def sanitized() -> Path:
    """A folder for PYTHONPATH in which `warpo.kernels` has the instrumented kernels."""
    folder = builds.ROOT / "build" / "sanitized"
    builds.module(folder)
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {CXX} "$@" {shlex.join(FLAGS)}\n')
    compiler.chmod(0o755)
    builds.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder],
        cwd=builds.ROOT,
        env={**os.environ, "CXX": str(compiler), "WARPO_CUDA": "0"},
    )
    return folder


@pytest.mark.slow(minutes=5)
@pytest.mark.timeout(1200)  # with the build, 5 minutes beside another job
def test_the_tests_of_the_kernels_pass(sanitized):
    paths = sorted((builds.ROOT / "tests" / "kernels").glob("test_*.py"))
    tests = [str(path) for path in paths if path.stem.removeprefix("test_") not in LEFT_OUT]
    assert " passed" in builds.run_tests(sanitized, tests, SELECTION, **ENVIRONMENT)


def test_a_read_past_a_tensor_ends_the_process(sanitized):
    code = """
import torch
from warpo.kernels import dispatch
from warpo.kernels._arguments.approx_kl import ApproxKlArguments
short, row = torch.zeros(1, 8), torch.zeros(1, 9)
tensors = {"logprobs": short, "ref_logprobs": row, "mask": None, "kl": row}
arguments = ApproxKlArguments(rows=1, columns=9, estimator=3, limit=10.0, **tensors)
dispatch.load("cpu").approx_kl_forward(arguments)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(sanitized)},
    )
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "approx_kl" in result.stderr
