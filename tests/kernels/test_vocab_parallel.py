import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.backends import BACKENDS, DEVICE
from warpo.kernels import ops

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


@pytest.mark.skipif(DEVICE != "cpu", reason="two ranks need two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_agree_with_the_whole_vocabulary(backend, tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path / "store"), backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


def test_what_is_no_group_is_refused():
    logits, targets = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be a torch.distributed.ProcessGroup, got str"):
        ops.logprobs(logits, targets, process_group="tp", backend="cpu")
    with pytest.raises(ValueError, match="not supported by backend 'reference'"):
        ops.logprobs(logits, targets, process_group="tp", backend="reference")
