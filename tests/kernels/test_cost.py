"""What a call costs: memory, and time against PyTorch's. Host time: test_contract."""

import statistics
import subprocess
import sys
import time
import timeit

import pytest
import torch

from tests.kernels.backends import DEVICE
from warpo.kernels import ops

MEMORY = """
import resource, torch
from warpo.kernels import ops
rows, vocab = 256, 151936
logits = torch.randn(rows, vocab)
targets = torch.randint(0, vocab, (rows,))
ops.logprobs_and_entropy(logits[:8], targets[:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.logprobs_and_entropy(logits, targets)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="the peak of the process is that of the CPU kernels")
def test_forward_makes_no_temporary_of_the_size_of_the_logits():
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    # KiB; the logits are 148 MiB
    assert int(result.stdout) < 4096


@pytest.mark.timing
@pytest.mark.skipif(DEVICE != "cpu", reason="`make gpu` times the kernels on a GPU")
def test_forward_is_five_times_as_fast_as_log_softmax_and_gather():
    logits, targets = torch.randn(1024, 151936), torch.randint(0, 151936, (1024,))
    calls = {
        "eager": lambda: torch.log_softmax(logits, -1).gather(-1, targets[:, None]),
        "warpo": lambda: ops.logprobs(logits, targets),
    }
    times = {name: [] for name in calls}
    for _ in range(9):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    assert medians["eager"] > 5 * medians["warpo"], medians


@pytest.mark.timing
@pytest.mark.skipif(DEVICE != "cpu", reason="`make gpu` times the optimizer on a GPU")
def test_the_step_of_hundreds_of_parameters_costs_little_beside_their_elements():
    # 338: those of a model of 28 layers. A guard: on an idle machine it takes 0.5 ms.
    parameters = [[torch.zeros(8, 4) for _ in range(338)] for _ in range(5)]
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    times = {}
    for name, call in {
        "step": lambda: ops.adamw_publish_foreach(*parameters, **numbers, steps=[1] * 338),
        "fingerprints": lambda: ops.fingerprint_foreach(parameters[4]),
    }.items():
        call()
        times[name] = min(timeit.repeat(call, number=1, repeat=100))
    assert times["step"] < 2e-3 and times["fingerprints"] < 0.5e-3, times
