"""What setup.py asks of the compilers, by compilers that only write down how they were called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMPILER = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then
    for arch in $KNOWN; do echo compute_$arch; done
elif [ "$1" = --dryrun ]; then
    echo '#$ LIBRARIES=  "-L{folder}"' >&2
else
    echo "$0 $*" >> "{folder}/calls"
fi
while [ $# -gt 0 ]; do
    case "$1" in -o | -MF) : > "$2" ;; esac
    shift
done
"""


def build(folder: Path, known: str, archs: str | None = None) -> tuple[int, str, list[str]]:
    """Exit status, output, and calls of nvcc for kernels, of a build where nvcc knows these."""
    (folder / "libcudart_static.a").touch()
    for name in ("nvcc", "cxx"):
        (folder / name).write_text(COMPILER.replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "KNOWN": known}
    environment["CXX"] = str(folder / "cxx")
    for name in ("WARPO_CUDA", "WARPO_CUDA_ARCHS", "CUDA_HOME"):
        environment.pop(name, None)
    if archs is not None:
        environment["WARPO_CUDA_ARCHS"] = archs
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = folder / "calls"
    made = calls.read_text().splitlines() if calls.exists() else []
    of_nvcc = [call for call in made if call.startswith(f"{folder}/nvcc ")]
    return done.returncode, done.stdout + done.stderr, of_nvcc


def codes(call: str) -> list[str]:
    return [x.rpartition(",code=")[2] for x in call.split() if x.startswith("-gencode")]


@pytest.mark.parametrize(
    "known, archs, wanted",
    [
        ("75 80 90 100 110 103 120", None, ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("50 75 80 86 90", None, ["sm_80", "sm_90", "compute_90"]),  # nvcc 12.0 to 12.7
        ("75 80 90 100 120", "90", ["sm_90", "compute_90"]),
        ("75 80 90 100 120", "120, 75", ["sm_75", "sm_120", "compute_120"]),
    ],
)
def test_kernels_are_compiled_for_what_nvcc_knows(tmp_path, known, archs, wanted):
    status, said, calls = build(tmp_path, known, archs)
    assert status == 0, said
    assert "-lineinfo" in calls[0].split()
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.c*")}
    assert {Path(call.split(" -c ")[1].split()[0]).name for call in calls} == sources
    assert all(codes(call) == wanted for call in calls)
    left_out = "does not know 100: _cuda is built without" in said
    assert left_out == (archs is None and "100" not in known.split())


@pytest.mark.parametrize(
    "known, archs, message",
    [
        ("80 90", "90a", "WARPO_CUDA_ARCHS=90a: nvcc knows 80, 90 and not 90a: choose of these"),
        ("80 90", "80,100", "WARPO_CUDA_ARCHS=80,100: nvcc knows 80, 90 and not 100: choose"),
        ("50 52", None, "nvcc knows 50, 52 and none of 80, 90, 100: choose another nvcc"),
    ],
)
def test_what_nvcc_does_not_know_is_refused_in_one_line(tmp_path, known, archs, message):
    status, said, calls = build(tmp_path, known, archs)
    assert status != 0 and not calls
    assert message in said.splitlines()[-1] and "Traceback" not in said
