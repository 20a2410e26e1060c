"""What a call costs: host time, memory, and the speed that the README states."""

import statistics
import subprocess
import sys
import time
import timeit

import pytest
import torch

from tests.kernels.backends import DEVICE
from warpo.kernels import dispatch, ops

# The promise is 15 us above the launch on an idle machine; CI shares its two cores.
HOST_COST_US = 30.0


def microseconds(call, number: int = 2000) -> float:
    call()
    return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6


@pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU the launch itself is what takes the host's time"
)
def test_host_cost_above_the_launch():
    backend = dispatch.load("cpu")
    logits, targets = torch.randn(2, 4, 8), torch.randint(0, 8, (2, 4))
    row, stats = torch.empty(2, 4), torch.empty(2, 4, 2)
    shape = logits.shape
    launch = microseconds(
        lambda: backend.logprobs_forward(
            *shape, logits, targets, 1.0, None, None, -100, row, None, stats, None
        )
    )
    leaf = logits.clone().requires_grad_()
    logp, count = row.clone().requires_grad_(), torch.tensor(8.0)
    calls = {
        "logprobs": lambda: ops.logprobs(logits, targets),
        "logprobs with gradient": lambda: ops.logprobs(leaf, targets),
        "gae": lambda: ops.gae(row, row, gamma=0.9, gae_lambda=0.9),
        "policy_loss": lambda: ops.policy_loss(logp, row, row, "dapo", denominator=count),
        "group_advantages": lambda: ops.group_advantages(row.flatten(), 4),
    }
    costs = {name: microseconds(call) - launch for name, call in calls.items()}
    assert max(costs.values()) < HOST_COST_US, costs


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


@pytest.mark.slow
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
