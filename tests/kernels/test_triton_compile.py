"""The Triton kernels through the real compiler, without a GPU: registers, spills, wide loads.

A worker process calls the launchers on CPU tensors, with a driver that names an architecture and
has no device, and stops every launch after compilation. What is compiled is therefore what a GPU
would run. `python -m tests.kernels.test_triton_compile` prints a table of all kernels.
"""

import ast
import functools
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels import launches
from tests.kernels.launches.logprobs import ALIGNED_VOCAB, logprobs

ARCHITECTURES = (80, 90, 100)
TRITON = Path(__file__).parents[2] / "kernels/_triton"


def _operations() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(launches.__path__)]
    return [importlib.import_module(f"tests.kernels.launches.{name}") for name in sorted(names)]


def _compile(arch: int) -> dict:
    """A row for every kernel of the configurations; on sm_90 also what varying them compiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    compiled: dict[int, tuple[str, object]] = {}
    label = ""
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        binary = launch(self, *args, grid=grid, warmup=True, **options)
        # the cache of the kernel returns the same object for the same specialisation
        compiled.setdefault(id(binary), (label, binary))
        return binary

    JITFunction.run = compile_only
    for operation in _operations():
        for label, launch_one in operation.configurations(arch == 90):  # noqa: B007
            launch_one()
    rows = [_describe(arch, label, binary) for label, binary in compiled.values()]
    if arch != 90:
        return {"rows": rows}
    label = again = "same kernels again"
    for operation in _operations():
        for launch_one in operation.variations():
            launch_one()
    label = "another dtype"
    logprobs(torch.float16, ALIGNED_VOCAB, True)
    names = {name: [b.name for x, b in compiled.values() if x == name] for name in (label, again)}
    return {"rows": rows, "recompiled": names[again], "control": names[label]}


def _describe(arch: int, label: str, binary) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cuobjdump = tools / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [
                cuobjdump if cuobjdump.exists() else shutil.which("cuobjdump"),
                "--dump-resource-usage",
                file.name,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    ptx = binary.asm["ptx"]
    return {
        "kernel": binary.name.strip("_").removesuffix("_kernel"),
        "configuration": label,
        "arch": arch,
        "registers": int(fields["REG"]),
        "spilled_bytes": int(fields["STACK"]) + int(fields["LOCAL"]),
        "shared_bytes": binary.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        "wide_async_loads": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx)),
        "wide_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)),
    }


def _kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Name and definition of every kernel in kernels/_triton."""
    for path in TRITON.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name.strip("_").removesuffix("_kernel"), node


def table(rows: list[dict]) -> str:
    lines = [
        f"{'kernel':22} {'configuration':28} {'arch':>4} {'regs':>4} {'spill':>5} {'shared':>6}"
    ]
    lines += [
        f"{r['kernel']:22} {r['configuration']:28} {r['arch']:>4} {r['registers']:>4} "
        f"{r['spilled_bytes']:>5} {r['shared_bytes']:>6}"
        for r in rows
    ]
    return "\n".join(lines)


@functools.cache
def compile_for(arch: int) -> dict:
    """What a worker process finds for an architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    worker = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_triton_compile", str(arch)],
        env=environment,
        cwd=TRITON.parents[1],
        capture_output=True,
        text=True,
    )
    if worker.returncode:
        raise RuntimeError(f"compiling for sm_{arch} failed:\n{worker.stderr[-6000:]}")
    found = json.loads(worker.stdout.splitlines()[-1])
    print(table(found["rows"]))
    return found


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# The H200's also has every variant.
each_architecture = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 90, 100)]
)


@needs_triton
@each_architecture
def test_nothing_spills(arch):
    rows = compile_for(arch)["rows"]
    assert {row["kernel"] for row in rows} == {name for name, _ in _kernels()}
    assert not [row for row in rows if row["spilled_bytes"]]


@needs_triton
@each_architecture
def test_logits_move_16_bytes_at_a_time(arch):
    rows = compile_for(arch)["rows"]
    aligned = [row for row in rows if " aligned" in row["configuration"]]
    forward = [row for row in aligned if row["kernel"] == "logprobs_fwd"]
    backward = [row for row in aligned if row["kernel"] == "logprobs_bwd"]
    # a row, a chunk of it, and the merge of the chunks, which reads no logits
    assert forward and len(forward) == 3 * len(backward)
    for row in [row for row in forward if row["wide_loads"] or row["wide_async_loads"]]:
        # the blocks come through cp.async, the last, partial one through plain loads
        elements = 2 if row["configuration"].startswith("bf16") else 4
        assert row["wide_async_loads"] >= elements and row["wide_loads"] >= elements, row
    assert sum(row["wide_loads"] > 0 for row in forward) == 2 * len(backward)
    for row in backward:
        elements = 4 if row["configuration"].startswith("bf16") else 8
        assert row["wide_loads"] >= elements and row["wide_stores"] >= elements, row
    odd = [row for row in rows if " odd" in row["configuration"]]
    assert odd and not any(row["wide_loads"] or row["wide_stores"] for row in odd)


def test_row_offsets_are_64_bits_wide():
    """A stride times a row passes 2^31, which only a parameter declared int64 holds everywhere."""
    strides = [
        ast.unparse(argument.annotation)
        for _, kernel in _kernels()
        for argument in kernel.args.args
        if "stride" in argument.arg
    ]
    assert len(strides) > 50 and set(strides) == {"tl.int64"}


@needs_triton
@pytest.mark.slow
def test_sizes_and_scalars_do_not_recompile():
    assert compile_for(90)["recompiled"] == []
    # another dtype does, so a second compilation would have been seen
    assert set(compile_for(90)["control"]) == {"_logprobs_fwd_kernel", "_logprobs_bwd_kernel"}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(_compile(int(sys.argv[1]))))
    else:
        for arch in ARCHITECTURES:
            compile_for(arch)
