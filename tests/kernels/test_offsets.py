"""Offsets of packed sequences: malformed ones, and the padding of a pack.

That tokens of no sequence have no part in any operation is promise 13 of test_contract.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.backends import BACKENDS, DEVICE, each_backend
from warpo.kernels import _offsets, ops

ROOT = Path(__file__).parents[2]
# two sequences and four tokens of padding
STARTS = torch.tensor([0, 4, 6], dtype=torch.int32, device=DEVICE)
with_reference = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


def padded(*numbers: float) -> torch.Tensor:
    return torch.tensor([*numbers, *[math.nan] * 4], device=DEVICE)


@each_backend
def test_no_malformed_offsets_crash_an_operation_or_pass_in_silence(backend):
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.offsets_worker", backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1" if DEVICE == "cpu" else "0"},
    )
    assert result.returncode == 0, result.stdout + result.stderr


@with_reference
@pytest.mark.parametrize("masked", [False, True])
def test_padding_of_a_pack_does_not_count_in_a_denominator(backend, masked):
    mask = torch.ones(10, dtype=torch.bool, device=DEVICE) if masked else None
    options = {"mask": mask, "cu_seqlens": STARTS, "backend": backend}
    zeros, ones = padded(*[0.0] * 6), padded(*[1.0] * 6)
    advantages = torch.tensor([1.0, 2.0], device=DEVICE)
    policy = ops.policy_loss(zeros, zeros, advantages, "dapo", **options)
    value = ops.value_loss(zeros, None, ones, clip_range=None, **options)
    assert policy.loss.item() == pytest.approx(-8 / 6) and value.loss.item() == 0.5
    assert policy.metrics[3] == 6 and value.metrics[1] == 6
    assert ops.aggregate(ones, **options).item() == 1
    logits = torch.zeros(10, 5, device=DEVICE)
    logits[6:] = math.nan
    targets = torch.zeros(10, dtype=torch.int64, device=DEVICE)
    found = ops.policy_loss_from_logits(
        logits.requires_grad_(), targets, advantages, "dapo", **options
    )
    assert found.loss.item() == pytest.approx(-8 / 6)
    assert (found.logprobs[6:] == 0).all() and (found.entropy[6:] == 0).all()
    found.loss.backward()
    assert (logits.grad[6:] == 0).all() and logits.grad.isfinite().all()


@with_reference
@pytest.mark.parametrize("masked", [False, True])
def test_padding_of_a_pack_is_not_whitened(backend, masked):
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1], device=DEVICE) > 0 if masked else None
    rewards = padded(1.0, 5.0, 2.0, 0.0, 3.0, 1.0)
    found = ops.gae(
        rewards,
        rewards,
        gamma=0.9,
        gae_lambda=0.8,
        mask=mask,
        cu_seqlens=STARTS,
        whiten=True,
        backend=backend,
    ).advantages
    valid = found[:6] if mask is None else found[:6][mask[:6]]
    assert abs(valid.mean()) < 1e-6 and abs(valid.std() - 1) < 1e-5
    assert (found[6:] == 0).all()


def test_padding_of_a_pack_is_not_in_the_reference_point():
    log_ratio = padded(1.0, 2.0, -1.0, 0.0, 1.0, 1.0)
    zeros, mask = torch.zeros_like(log_ratio), torch.ones(10, dtype=torch.bool, device=DEVICE)
    for given in (None, mask):
        point = ops.kto_reference_point(log_ratio, zeros, mask=given, cu_seqlens=STARTS)
        assert point.item() == 2


def test_padding_does_not_count_where_no_value_can_be_seen():
    mask = torch.ones(10, dtype=torch.bool, device=DEVICE)

    def losses(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        loss = ops.value_loss(
            values, None, values + 1, clip_range=None, mask=mask, cu_seqlens=starts
        ).loss
        return loss + ops.kto_reference_point(values + 2, values, cu_seqlens=starts)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(10, device=DEVICE), STARTS).item() == 0.5 + 6


@with_reference
def test_without_sequences_all_tokens_are_0(backend):
    rewards = torch.ones(5, device=DEVICE, requires_grad=True)
    starts = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    found = ops.gae(rewards, rewards, gamma=1.0, gae_lambda=1.0, cu_seqlens=starts, backend=backend)
    assert (found.advantages == 0).all() and (found.returns == 0).all()
    if found.returns.requires_grad:
        found.returns.sum().backward()
        assert (rewards.grad == 0).all()


def test_is_malformed():
    def malformed(*values: int) -> bool:
        return bool(_offsets.is_malformed(torch.tensor(values, dtype=torch.int32), 10))

    assert not malformed(0, 4, 10) and not malformed(3) and not malformed(2, 2, 2)
    assert malformed(-1, 4) and malformed(0, 11) and malformed(0, 5, 4) and malformed(11)
