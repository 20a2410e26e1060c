"""The CUDA kernels, run on the host by tests/emulator: their tests, in a random order of the
threads.

The emulator builds the kernels as a module `warpo.kernels._cpu`, so that the tests of the backend
"cpu" run them. WARPO_EMULATOR_ORDER chooses another order; each finds every fault that is planted
below. What this does not show stands at the head of each header there.
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

from tests.kernels import builds
from tests.kernels.backends import DEVICE
from tests.kernels.builds import ROOT

EMULATOR = ROOT / "tests" / "emulator"
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    f"-I{EMULATOR}",
    f"-I{ROOT / 'csrc'}",
]
BINDING_FLAGS = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
# Undefined behaviour ends the process: an index past shared memory, an overflow of int, a float4
# between two boundaries. A checked longjmp would refuse to change the stack.
KERNEL_FLAGS = [
    "-O2",
    "-fsanitize=undefined",
    "-fno-sanitize-recover=all",
    "-U_FORTIFY_SOURCE",
    "-include",
    f"{EMULATOR / 'language.h'}",
    "-x",
    "c++",
]
# An operation with CUDA kernels, whose tests are in the file of the same name.
OPERATIONS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
OPERATIONS += ["contract", "offsets"]
# A process for each part: half of an operation's time is that of imports and collection.
PARTS = [OPERATIONS[start::4] for start in range(4)]
# Of the tests of an operation, those that run a kernel for its values: registration and tracing are
# the same as for the CPU kernels.
SELECTION = "cpu and not opcheck and not compiles and not host_cost"

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the kernels themselves run on this device"),
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"needs a C++ compiler: {CXX[0]}"),
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH in which `warpo.kernels` has the emulated kernels."""
    folder = tmp_path_factory.mktemp("emulated")
    jobs = [(ROOT / "csrc" / "bindings.cpp", BINDING_FLAGS), (EMULATOR / "library.cpp", [])]
    jobs += [(source, KERNEL_FLAGS) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        target = folder / f"{source.stem}.o"
        builds.run([*CXX, *FLAGS, *flags, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    module = builds.module(folder)
    builds.run([*CXX, "-shared", "-fsanitize=undefined", *objects, "-o", module])
    return folder


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("operations", PARTS, ids=" ".join)
def test_the_tests_of_the_operations_pass(emulated, operations):
    order = os.environ.get("WARPO_EMULATOR_ORDER", "random")
    tests = [f"tests/kernels/test_{operation}.py" for operation in operations]
    environment = {"WARPO_EMULATOR_ORDER": order, "OMP_NUM_THREADS": "1"}
    # -v: with the name of each file that has tests of the selection
    said = builds.run_tests(emulated, [*tests, "-v"], SELECTION, **environment)
    assert all(test in said for test in tests), said


# Shared memory of a block in bytes, and whether the chip has clusters: compute capability 9.0, 8.0
# and 8.6, and chips so small that rows of the tests take clusters of 2, 4 and 8 blocks, or stay in
# part.
CHIPS = [
    *((232448, True), (166912, False), (101376, False)),
    *((60000, True), (20000, True), (8000, True), (2000, True), (2000, False)),
]


def of_chip(shared_bytes: int, clusters: bool) -> dict[str, str]:
    return {
        "WARPO_EMULATOR_SHARED": str(shared_bytes),
        "WARPO_EMULATOR_CLUSTERS": str(int(clusters)),
        "WARPO_EMULATOR_ORDER": os.environ.get("WARPO_EMULATOR_ORDER", "random"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow(minutes=1)
def test_a_row_has_the_same_bits_on_every_chip(emulated):
    worker = [sys.executable, "-m", "tests.kernels.kept_row_worker"]
    digests = set()
    for chip in CHIPS:
        environment = {**os.environ, "PYTHONPATH": str(emulated), **of_chip(*chip)}
        digests.add(builds.run(worker, cwd=ROOT, env=environment).stdout)
    assert len(digests) == 1, digests


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("clusters", [False, True])
def test_the_loss_from_logits_passes_on_a_chip_that_keeps_little_of_a_row(emulated, clusters):
    tests = ["tests/kernels/test_policy_loss_from_logits.py"]
    builds.run_tests(emulated, tests, SELECTION, **of_chip(2000, clusters))


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    """A program with a kernel that is wrong in the way that its argument names."""
    program = tmp_path_factory.mktemp("faults") / "faults"
    builds.run([*CXX, *FLAGS, *KERNEL_FLAGS, EMULATOR / "faults.cpp", "-o", program])
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
        ("count_before_fence", "atomicInc without __threadfence"),
        ("counter_left", "a launch has left its counter at 40"),
        ("neighbour_read_before_written", "wrong result"),
        ("neighbour_read_after_its_end", "reads the shared memory of block"),
        ("a_block_stays_away", "192 wait for the cluster, and others do not come"),
        ("copy_read_before_waited_for", "wrong result"),
        ("past_dynamic_shared_memory", "writes past shared memory"),
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
