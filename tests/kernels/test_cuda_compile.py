"""What the CUDA kernels compile to, and how the library fails where there is no GPU. Needs none."""

import importlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from warpo.kernels._arguments.group_advantages import GroupAdvantagesArguments

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
OF_LOGITS = ("logprobs", "policy_loss_from_logits")


def _find(tool: str) -> str | None:
    """A tool of the CUDA toolkit: on the PATH, under CUDA_HOME, or in the package of Triton."""
    folders = [os.environ.get("PATH", "")]
    if "CUDA_HOME" in os.environ:
        folders.append(f"{os.environ['CUDA_HOME']}/bin")
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(tool, path=os.pathsep.join(folders))


NVCC, CUOBJDUMP = shutil.which("nvcc") or _find("nvcc"), _find("cuobjdump")
needs_tools = pytest.mark.skipif(
    NVCC is None or CUOBJDUMP is None,
    reason=f"needs nvcc (found: {NVCC}) and cuobjdump (found: {CUOBJDUMP})",
)


def _run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Source and architecture to cubin, each compiled once."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_once(source: Path, arch: int) -> Path:
        cubin = folder / f"{source.stem}.{arch}.cubin"
        if not cubin.exists():
            _run(
                NVCC,
                "-O3",
                "-std=c++17",
                f"-arch=sm_{arch}",
                "-cubin",
                f"-I{ROOT / 'csrc'}",
                "-o",
                cubin,
                source,
            )
        return cubin

    return compile_once


def _kernels(listing: str, header: str) -> dict[str, str]:
    """A listing of cuobjdump by kernel; `header` is what stands before a kernel's name."""
    parts = re.split(rf"^\s*{header}\s*(\S+?):?\s*$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _each_source() -> Iterator[Any]:
    """On each architecture; those that another test compiles too are not slow."""
    for source, arch in itertools.product(SOURCES, ARCHITECTURES):
        quick = arch == 90 and source.stem in OF_LOGITS
        marks = () if quick else pytest.mark.slow
        yield pytest.param(source, arch, id=f"{source.stem}-{arch}", marks=marks)


@needs_tools
@pytest.mark.parametrize("source, arch", _each_source())
def test_no_register_spills_and_no_local_memory(compiled, source, arch):
    if f"compute_{arch}" not in _run(NVCC, "--list-gpu-arch").split():
        pytest.skip(f"{NVCC} does not know sm_{arch}, and builds without it")
    cubin = compiled(source, arch)
    kernels = _kernels(_run(CUOBJDUMP, "--dump-resource-usage", cubin), "Function")
    assert kernels
    for name, usage in kernels.items():
        used = dict(re.findall(r"\b([A-Z]+):(\d+)", usage))
        assert used["STACK"] == "0" and used["LOCAL"] == "0", f"{name}: {usage}"


@needs_tools
@pytest.mark.parametrize("operation", OF_LOGITS)
def test_logits_move_16_bytes_at_a_time(compiled, operation):
    source = ROOT / "csrc" / "cuda" / f"{operation}.cu"
    kernels = _kernels(_run(CUOBJDUMP, "--dump-sass", compiled(source, 90)), "Function :")
    # these merge what others have read of the logits, count tokens, or scale what is written
    helpers = ("finish_kernel", "count_kernel", "scale_kernel")
    of_logits = {n: code for n, code in kernels.items() if not any(h in n for h in helpers)}
    # with and without entropy: three dtypes of the logits, whose gradient is of the same or, for
    # float32, of two others; logprobs has forward and its chunks too
    assert len(of_logits) == (12 + 10 if operation == "logprobs" else 10), sorted(of_logits)
    for name, code in of_logits.items():
        writes = "backward" in name or operation == "policy_loss_from_logits"
        stored = 64 if re.search(r"ILi0ELi[12]E", name) else 128
        assert len(re.findall(r"\bLDG\.E\S*\.128\b", code)) >= 4, name
        assert not writes or re.search(rf"\bSTG\.E\S*\.{stored}\b", code), name
        assert not re.search(r"\b(LDL|STL)\b", code), name
        if operation == "policy_loss_from_logits":
            assert re.search(r"\bLDGSTS\.E\S*\.128\b", code), name


@pytest.mark.skipif(
    importlib.util.find_spec("warpo.kernels._cuda") is None,
    reason="warpo.kernels._cuda is not built: pip install -e . with nvcc on the PATH",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_library_imports_and_a_call_says_what_is_missing():
    library = importlib.import_module("warpo.kernels._cuda")
    arguments = GroupAdvantagesArguments(
        groups=1,
        rewards=(0, 0, 1, 0),
        lengths=None,
        group_size=1,
        order=None,
        offsets=None,
        std_mode=0,
        leave_one_out=False,
        eps=1e-6,
        advantages=None,
        mean=None,
        std=None,
        degenerate=None,
    )
    with pytest.raises(RuntimeError, match="group_advantages: .*CUDA (driver|device).*CPU"):
        library.group_advantages_forward(arguments, 0, 0)
