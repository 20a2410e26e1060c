"""The CUDA kernels, run on the host by tests/emulator: their tests, in two orders of the threads.

The emulator builds the kernels as a module `warpo.kernels._cpu`, so that the tests of the backend
"cpu" run them; WARPO_EMULATOR_ORDER is the order. What this does not show stands at the head of
each header there.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from tests.kernels.backends import DEVICE

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "emulator"
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
    f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip
BINDING_FLAGS = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
# Undefined behaviour ends the process: an index past shared memory, an overflow of int, a float4
# between two boundaries. A checked longjmp would refuse to change the stack.
KERNEL_FLAGS = [
    "-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-U_FORTIFY_SOURCE",
    "-include", f"{EMULATOR / 'language.h'}", "-x", "c++",
]  # fmt: skip
# An operation with CUDA kernels, whose tests are in the file of the same name.
OPERATIONS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
OPERATIONS += ["contract", "offsets"]
# Of the tests of an operation, those that run a kernel for its values: registration and tracing are
# the same as for the CPU kernels.
SELECTION = "cpu and not opcheck and not compiles and not host_cost"

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the kernels themselves run on this device"),
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"needs a C++ compiler: {CXX[0]}"),
]


def _run(command: list[str | Path], **options) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH in which `warpo.kernels` has the emulated kernels."""
    folder = tmp_path_factory.mktemp("emulated")
    package = folder / "warpo" / "kernels"
    package.mkdir(parents=True)
    for source in (ROOT / "kernels").glob("*.py"):
        (package / source.name).symlink_to(source)
    jobs = [(ROOT / "csrc" / "bindings.cpp", BINDING_FLAGS), (EMULATOR / "library.cpp", [])]
    jobs += [(source, KERNEL_FLAGS) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        target = folder / f"{source.stem}.o"
        _run([*CXX, *FLAGS, *flags, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    module = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*CXX, "-shared", "-fsanitize=undefined", *objects, "-o", module])
    return folder


# Fails where another warpo.kernels comes first: that of an installed warpo, say.
PYTEST = """
import sys
import pytest
from warpo.kernels import _cpu
assert _cpu.instruction_set() == "emulated", _cpu.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("order", ["reverse", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_tests_of_the_operation_pass(emulated, operation, order):
    path = [str(emulated), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "WARPO_EMULATOR_ORDER": order,
        "OMP_NUM_THREADS": "1",
    }
    tests = f"tests/kernels/test_{operation}.py"
    # -s: pytest would keep the last words of a process that ends in undefined behaviour
    options = ["-k", SELECTION, "-q", "-s", "-p", "no:cacheprovider"]
    _run([sys.executable, "-c", PYTEST, tests, *options], cwd=ROOT, env=environment)


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    """A program with a kernel that is wrong in the way that its argument names."""
    program = tmp_path_factory.mktemp("faults") / "faults"
    _run([*CXX, *FLAGS, *KERNEL_FLAGS, EMULATOR / "faults.cpp", "-o", program])
    return program


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("none", None),
        ("read_before_written", "wrong result"),
        ("overwritten_before_read", "wrong result"),
        ("half_a_warp_shuffles", "16 wait in a shuffle or vote and 32 in __syncthreads"),
        ("a_thread_returns", "0 wait in a shuffle or vote and 63 in __syncthreads"),
        ("misaligned_vector", "16-byte access 4 bytes past a boundary"),
        ("past_shared_memory", "index 64 out of bounds"),
        ("no_blocks", "a launch of 0 blocks of 64 threads"),
    ],
)
def test_the_emulator_sees_a_fault(faults, fault, message, order):
    result = subprocess.run(
        [faults, fault],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "WARPO_EMULATOR_ORDER": order},
    )
    if message is None:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0
        assert message in result.stderr
