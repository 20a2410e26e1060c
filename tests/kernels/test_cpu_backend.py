"""What is particular to the C++ kernels of the CPU: instruction sets, threads, the OpenMP pool."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from tests.kernels.backends import DEVICE
from warpo.kernels import _cpu, ops
from warpo.kernels._arguments.approx_kl import ApproxKlArguments
from warpo.kernels._arguments.squashed_gaussian import (
    SquashedGaussianArguments,
    SquashedGaussianBackwardArguments,
)
from warpo.kernels._native import Native

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="`make gpu` tests the GPU's kernels")

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def chosen(**environment: str) -> str:
    code = "import torch; from warpo.kernels import _cpu; print(_cpu.instruction_set())"
    return python(code, **environment)


@pytest.mark.slow(minutes=0.5)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has several")
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_passes_the_tests_of_the_kernels(level):
    if LEVELS.index(level) > LEVELS.index(chosen()):
        pytest.skip(f"this processor has no {level}")
    assert chosen(WARPO_ISA=level) == level
    if level == chosen():
        return  # the tests in this process run on it
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            "float64 and cpu",
            "tests/kernels",
            "--ignore",
            "tests/kernels/test_cuda_emulated.py",
            "-p",
            "no:cacheprovider",
        ],
        env=os.environ | {"WARPO_ISA": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_an_unknown_instruction_set_is_refused():
    code = "import torch; from warpo.kernels import _cpu; _cpu.instruction_set()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"WARPO_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "avx1024" in result.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of libraries")
def test_the_threads_are_those_of_torch():
    """A second OpenMP runtime would start threads of its own, twice as many as there are cores."""
    code = """
import torch
from warpo.kernels import _cpu, ops
from warpo.kernels._native import Native
ops.logprobs(torch.randn(64, 50000), torch.zeros(64, dtype=torch.int64))
lines = open("/proc/self/maps").read().split()
print(len({word for word in lines if "gomp" in word or "libomp" in word or "iomp" in word}))
"""
    assert python(code) == "1"


def test_set_num_threads_is_obeyed():
    code = """
import time, torch
from warpo.kernels import _cpu, ops
from warpo.kernels._native import Native
torch.set_num_threads(1)
logits, targets = torch.randn(256, 100000), torch.zeros(256, dtype=torch.int64)
ops.logprobs(logits, targets)
wall, busy = time.perf_counter(), time.process_time()
for _ in range(20):
    ops.logprobs(logits, targets)
print((time.process_time() - busy) / (time.perf_counter() - wall))
"""
    assert float(python(code)) < 1.1
    assert torch.get_num_threads() >= 1


def test_thread_count_does_not_change_bits():
    if DEVICE != "cpu":
        pytest.skip("threads are those of the CPU kernels")
    logits, targets = 3 * torch.randn(3, 50001), torch.randint(0, 50001, (3,))
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(ops.logprobs_and_entropy(logits, targets, backend="cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_alike_with_and_without_dlpack(dtype, monkeypatch):
    """Before 2.10 torch has no exchange API."""
    logprobs, ref = torch.randn(6, 10).to(dtype)[::2, ::3], torch.randn(4, dtype=dtype)
    mask = torch.rand(3, 4) < 0.5
    results = []
    for api in (getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), None):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", api, raising=False)
        out = torch.empty(3, 4)
        operations = Native(_cpu)
        arguments = ApproxKlArguments(
            rows=3,
            columns=4,
            logprobs=logprobs,
            ref_logprobs=ref.expand(3, 4),
            mask=mask,
            estimator=3,
            limit=10.0,
            kl=out,
        )
        operations.approx_kl_forward(arguments)
        results.append(out)
    assert torch.equal(*results)
    assert results[0].any() and not results[0][~mask].any()


def test_a_tuple_within_a_tuple_is_read_alike_with_and_without_dlpack(monkeypatch):
    mean, noise, upstream = torch.randn(3, 4, 5)
    results = []
    for api in (getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), None):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", api, raising=False)
        gradients = torch.empty(2, 4, 5)
        forward = SquashedGaussianArguments(
            rows=4,
            columns=5,
            mean=mean,
            log_std=-mean,
            noise=noise,
            log_std_min=-5.0,
            log_std_max=2.0,
            actions=None,
            logprobs=None,
        )
        arguments = SquashedGaussianBackwardArguments(
            forward=forward,
            grad_actions=upstream,
            grad_logprobs=None,
            grad_mean=gradients[0],
            grad_log_std=gradients[1],
        )
        Native(_cpu).squashed_gaussian_backward(arguments)
        results.append(gradients)
    assert torch.equal(*results) and results[0].isfinite().all() and results[0].any()
