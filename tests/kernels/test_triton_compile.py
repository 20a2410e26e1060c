"""The Triton kernels through the real compiler, without a GPU: registers, spills, wide loads.

A worker process calls the launchers on CPU tensors, with a driver that names an architecture and
has no device, and stops every launch after compilation. What is compiled is therefore what a GPU
would run. As a script, `python tests/kernels/test_triton_compile.py` prints a table of all kernels.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
# divisible by 16, or not even by 2; both past one block of 4096
ALIGNED_VOCAB, ODD_VOCAB = 8192 + 512, 8191


def _flags(like: Tensor, present: bool) -> Tensor | None:
    # preserves the strides of `like`
    return torch.empty_like(like, dtype=torch.bool) if present else None


def logprobs(
    dtype: torch.dtype, vocab: int, full: bool, tokens: int = 4, temperature: float = 0.7
) -> None:
    from warpo.kernels import _triton

    logits = torch.empty(1, tokens, vocab, dtype=dtype)
    targets = torch.zeros(1, tokens, dtype=torch.int64)
    row = torch.empty(1, tokens)
    entropy, token_temperature = (row, row) if full else (None, None)
    stats = torch.empty(1, tokens, 2)
    common = (
        *logits.shape,
        logits,
        targets,
        temperature,
        token_temperature,
        _flags(row, full),
        -100,
    )
    _triton.logprobs_forward(*common, row, entropy, stats)
    _triton.logprobs_backward(*common, None, entropy, stats, row, entropy, torch.empty_like(logits))


def gae(
    rows: int, steps: int, layout: str, full: bool, starts_at_t: bool = False, gamma: float = 0.99
) -> None:
    from warpo.kernels import _triton

    token = torch.empty(steps, rows).t() if layout == "dense rows" else torch.empty(rows, steps)
    if layout == "strided":
        token = torch.empty(rows, 2 * steps)[:, ::2]
    last = torch.empty(rows, 1)
    final = token if full else None
    last_flag = _flags(last, full and starts_at_t)
    flags = [_flags(token, full) for _ in range(3)]
    options = (gamma, 0.95, not starts_at_t, starts_at_t)
    _triton.gae_forward(
        rows, steps, token, token, last, final, *flags, last_flag, last_flag, *options, token, token
    )
    _triton.gae_backward(
        rows, steps, None, None, None, final, *flags, last_flag, last_flag, *options, None, None,
        token, token, token, token, last, final,
    )  # fmt: skip


def policy_loss(
    dtype: torch.dtype, packed: bool, sequence: bool, mean: bool, kl: int,
    rows: int = 4, steps: int = 100, clip: float = 0.2,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    ref = token if kl else None
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    scalar, gradient = torch.empty(()), torch.empty(rows, steps)
    _triton.policy_loss(
        rows, steps, cu_seqlens, token, token, token, ref, _flags(token, mean), sequence, mean,
        1 - clip, 1 + clip, kl, clip / 2, 100 * clip, scalar, gradient,
        torch.empty(rows, 10), scalar, torch.empty(10),
    )  # fmt: skip


def group_advantages(std: int, leave_one_out: bool, by_id: bool, groups: int = 4) -> None:
    from warpo.kernels import _triton

    answers = torch.empty(8 * groups)
    order, offsets = (torch.empty(n, dtype=torch.int64) for n in (8 * groups, groups + 1))
    statistic = torch.empty(groups)
    common = (
        groups,
        answers,
        0 if by_id else 8,
        order if by_id else None,
        offsets if by_id else None,
    )
    options = (std, leave_one_out, 1e-6)
    count = torch.zeros((), dtype=torch.int32)
    _triton.group_advantages_forward(*common, *options, answers, statistic, statistic, count)
    _triton.group_advantages_backward(
        *common, *options, None, statistic, statistic, None, answers, answers
    )


def _configurations(all_of_them: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Label and launch of every configuration, or of the largest of each kind."""
    some = (True,) if not all_of_them else (False, True)
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        for vocab, alignment in ((ALIGNED_VOCAB, "aligned"), (ODD_VOCAB, "odd")):
            for full in some:
                label = f"{short} {alignment}{' entropy mask' if full else ''}"
                yield label, partial(logprobs, dtype, vocab, full)
    for sequence in (False, True):
        for kl in range(4) if all_of_them else (3,):
            dtype, packed, mean = (torch.bfloat16, torch.float32)[kl % 2], kl % 2 == 1, kl >= 2
            label = f"{'sequence' if sequence else 'token'} k{kl}{' mean mask' if mean else ''}"
            yield label, partial(policy_loss, dtype, packed, sequence, mean, kl)
    for layout, steps in (("dense time", 100), ("dense time", 2000), ("dense rows", 50)):
        yield f"{layout} {steps} flags", partial(gae, 64, steps, layout, True)
        if all_of_them:
            yield f"{layout} {steps}", partial(gae, 64, steps, layout, False)
            yield f"{layout} {steps} starts_at_t", partial(gae, 64, steps, layout, True, True)
    if all_of_them:
        yield "strided flags", partial(gae, 64, 50, "strided", True)
    for std in range(3) if all_of_them else (1,):
        by_id = std == 1
        label = f"std {std}{' by id' * by_id}"
        yield label, partial(group_advantages, std, by_id, by_id)


def _same_kernels_again() -> None:
    """Other sizes, strides and scalars, which must not compile anything."""
    for tokens in (1, 16, 37):
        for vocab in (ALIGNED_VOCAB + 16, 64):
            logprobs(torch.bfloat16, vocab, True, tokens, temperature=float(tokens))
        logprobs(torch.bfloat16, 101, True, tokens)
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        gae(rows, steps, "dense time", True, gamma=0.9)
        gae(rows, 129 + 16 * steps, "dense time", True)
        gae(2 * rows, steps + 1, "dense rows", True)
        policy_loss(torch.bfloat16, False, False, True, 2, rows, steps, clip=1 / (rows + 1))
        policy_loss(torch.float32, True, True, True, 3, rows, steps, clip=0.0)
        group_advantages(1, True, True, groups=rows)


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
    for label, configuration in _configurations(arch == 90):  # noqa: B007
        configuration()
    rows = [_describe(arch, label, binary) for label, binary in compiled.values()]
    if arch != 90:
        return {"rows": rows}
    label = again = "same kernels again"
    _same_kernels_again()
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


def compile_all() -> dict[int, dict]:
    """A worker process for each architecture, two at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(arch: int) -> dict:
        worker = subprocess.run(
            [sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True
        )
        if worker.returncode:
            raise RuntimeError(f"compiling for sm_{arch} failed:\n{worker.stderr[-6000:]}")
        return json.loads(worker.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(run, ARCHITECTURES), strict=True))


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    results = compile_all()
    for result in results.values():
        print(table(result["rows"]))
    return results


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(compiled, arch):
    rows = compiled[arch]["rows"]
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "logprobs_fwd", "logprobs_bwd", "gae_fwd", "gae_bwd", "policy_loss", "reduce",
        "group_advantages_fwd", "group_advantages_bwd",
    }  # fmt: skip
    assert not [row for row in rows if row["spilled_bytes"]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_move_16_bytes_at_a_time(compiled, arch):
    rows = compiled[arch]["rows"]
    aligned = [row for row in rows if " aligned" in row["configuration"]]
    forward = [row for row in aligned if row["kernel"] == "logprobs_fwd"]
    backward = [row for row in aligned if row["kernel"] == "logprobs_bwd"]
    assert forward and len(forward) == len(backward)
    for row in forward:
        # the blocks come through cp.async, the last, partial one through plain loads
        elements = 2 if row["configuration"].startswith("bf16") else 4
        assert row["wide_async_loads"] >= elements and row["wide_loads"] >= elements, row
    for row in backward:
        elements = 4 if row["configuration"].startswith("bf16") else 8
        assert row["wide_loads"] >= elements and row["wide_stores"] >= elements, row
    odd = [row for row in rows if " odd" in row["configuration"]]
    assert odd and not any(row["wide_loads"] or row["wide_stores"] for row in odd)


def test_row_offsets_are_64_bits_wide():
    """A stride times a row passes 2^31, which only a parameter declared int64 holds everywhere."""
    strides = []
    for path in (Path(__file__).parents[2] / "kernels/_triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            jitted = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
            for argument in node.args.args if jitted else ():
                if "stride" in argument.arg:
                    strides.append(ast.unparse(argument.annotation))
    assert len(strides) > 50 and set(strides) == {"tl.int64"}


def test_sizes_and_scalars_do_not_recompile(compiled):
    assert compiled[90]["recompiled"] == []
    # another dtype does, so a second compilation would have been seen
    assert compiled[90]["control"] == ["_logprobs_fwd_kernel", "_logprobs_bwd_kernel"]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(_compile(int(sys.argv[1]))))
    else:
        print("\n".join(table(result["rows"]) for result in compile_all().values()))
