"""The programs of `make gpu` and `make gpu-sanitize`, each with its share of the time."""

import glob
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from warpo.bench.gpu.build import module
from warpo.bench.gpu.runner import Step

Stages = Sequence[Sequence[Step]]

BUDGET_S = {"gpu": 480.0, "sanitize": 200.0}
WORKERS = 12
# CI compiles and emulates the kernels, and runs those of the CPU, without a GPU.
RUN_BY_CI = (
    "test_triton_compile",
    "test_cuda_compile",
    "test_cuda_emulated",
    "test_cpu_backend",
    "test_sanitizers",
)
# The fastest tests that each backend has, on a machine without a GPU.
_SHORT_TESTS = "tests/kernels/test_approx_kl.py"
TOOLS = ("memcheck", "racecheck", "synccheck")


def gpu(out: Path, device: str) -> Stages:
    """Those of `make gpu`, 480 seconds; first what cannot be had elsewhere."""
    return [
        [_program("versions", 10, out, device)],
        [_program("build", 80, out, device)],
        [_python("smoke", 30, "tests.kernels.smoke", out, device), _graphs(out, device)],
        [_program("table", 130, out, device)],
        [_program("counters", 55, out, device)],
        [_tests("tests", 90, "cuda", out, device)],
        [_program("training", 85, out, device)],
    ]


def sanitize(out: Path, device: str) -> Stages:
    """Those of `make gpu-sanitize`, 200 seconds, with the module that `make gpu` has built or, in
    less time for the others, one that it builds.
    """
    built = device == "cpu" or module("_cuda").exists()
    build = [] if built else [[_program("build", 80, out, device)]]
    checks_s, rows_s = (120, 75) if built else (80, 40)
    tests = _tests("triton", checks_s, "triton", out, device)
    return [
        *build,
        # each leaves most of the GPU and of the cores idle
        [tests, *(_checked(tool, checks_s, device) for tool in TOOLS)],
        [_program("table", rows_s, out, device, "--official")],
    ]


def _program(name: str, limit_s: float, out: Path, device: str, *words: str) -> Step:
    return _python(name, limit_s, f"warpo.bench.gpu.{name}", out, device, *words)


def _python(name: str, limit_s: float, program: str, out: Path, device: str, *words: str) -> Step:
    command = [sys.executable, "-m", program, "--out", str(out), "--device", device, *words]
    return Step(name=name, limit_s=limit_s, command=command)


def _graphs(out: Path, device: str) -> Step:
    """What the smoke test leaves to pytest: replays with other inputs, on CUDA."""
    words = ["tests/kernels/test_cuda_graphs.py", "-k", "replay and cuda", "-n", "0"]
    return _pytest("graphs", 30, words, out, device)


def _tests(name: str, limit_s: float, backend: str, out: Path, device: str) -> Step:
    """The kernel tests of a backend, with a limit to each where pytest has one."""
    if device == "cpu":
        return _pytest(name, limit_s, [_SHORT_TESTS, "-k", "cpu"], out, device)
    words = ["tests/kernels", "-k", backend]
    words += [f"--ignore=tests/kernels/{name}.py" for name in RUN_BY_CI]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(WORKERS), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        words += ["--timeout", "60"]
    return _pytest(name, limit_s, words, out, device)


def _pytest(name: str, limit_s: float, words: Sequence[str], out: Path, device: str) -> Step:
    options = ("-q", "-p", "no:cacheprovider", "-p", "warpo.bench.gpu.pytest_rows")
    return Step(
        name=name,
        limit_s=limit_s,
        command=[sys.executable, "-m", "pytest", *options, *words],
        environment={
            "WARPO_TEST_DEVICE": device,
            "WARPO_GPU_OUT": str(out.absolute()),
            "WARPO_GPU_STEP": name,
        },
        log=f"{name}.txt",
    )


def _checked(tool: str, limit_s: float, device: str) -> Step:
    """Small calls of the kernels under a tool of compute-sanitizer; status 9 if it finds
    something. Without torch's cache of memory, each tensor has bounds that it knows.
    """
    program = [sys.executable, "-m", "tests.kernels.small_calls", "--device", device]
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    return Step(
        name=tool,
        limit_s=limit_s,
        command=program if device == "cpu" else [find_sanitizer(), *options, *program],
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {},
        log=f"{tool}.txt",
    )


def find_sanitizer() -> str:
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), reverse=True)
    name = "compute-sanitizer"
    return shutil.which(name) or (places[0] if places else name)


def environment(root: Path, site: Path) -> dict[str, str]:
    """Variables of all steps: the wheels and the tree are found, nothing is fetched, and nothing
    that is printed waits in a buffer.
    """
    path = [str(site), os.environ.get("PYTHONPATH", ""), str(root)]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
