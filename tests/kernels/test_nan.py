"""A NaN is never lost: not in a maximum, a clip, a clamp or a comparison, on any backend."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import BACKENDS, DEVICE, each_backend
from tests.kernels.operations import OPERATIONS, Operation
from tests.kernels.test_contract import run
from warpo.kernels import ops

_CHUNK = 4096  # of the vocabulary, of which the CPU kernels and Triton's reduce one at a time
_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "policy_loss": [
        {"objective": name}
        for name in (
            "grpo",
            "ppo_dual_clip",
            "reinforce",
            "ppo_kl",
            "cispo",
            "gspo",
            "gmpo",
            "sapo",
            "off_policy_prefix",
            "grpo_tis",
            "grpo_mis",
            "grpo_icepop",
        )
    ],
    "value_loss": [{}, {"loss": "huber", "huber_delta": 0.5}, {"clip_range": None}],
    "preference_loss": [{"loss": name} for name in ("dpo", "robust_dpo", "ipo", "hinge", "orpo")],
    "approx_kl": [{}, {"estimator": "k1", "limit": 2.0}, {"estimator": "k2", "gradient": "k2"}],
    "group_advantages": [{}, {"std": "none", "baseline": "leave_one_out"}, {"std": "population"}],
    "shaped_gae": [{}, {"kl_estimator": "k3"}, {"entropy_coef": 0.1}],
    "gae": [{}, {"mask_mode": "zero"}, {"whiten": True}],
    "whiten": [{}, {"shift_mean": False}],
}


def _cases() -> Iterator[Any]:
    for operation in OPERATIONS:
        if operation.name not in ("fingerprint", "adamw_publish"):  # of bits; of its own tests
            for options in _OPTIONS.get(operation.name, [{}]):
                name = "-".join(map(str, (operation.name, *options.values())))
                yield pytest.param(operation, options, id=name)


def _tensors(operation: Operation) -> dict[str, Tensor]:
    tensors = operation.tensors()
    if operation.name == "policy_loss":
        tensors["sampler_logprobs"] = tensors["old_logprobs"].flip(1)
        tensors["entropy"] = -tensors["old_logprobs"]
    return tensors


@pytest.mark.parametrize("operation, options", _cases())
@each_backend
def test_a_nan_reaches_what_the_definition_says(operation, options, backend):
    slow = DEVICE == "cpu" and backend == "triton"
    if slow and (operation.name.startswith("linear") or operation.name.endswith("_from_hidden")):
        pytest.skip("it composes the others, and Triton's interpreter is slow")
    chosen = dataclasses.replace(operation, options=operation.options | options)
    for name in _tensors(operation):
        tensors = _tensors(operation)
        if not tensors[name].is_floating_point() or slow and name.startswith("ref_"):
            continue
        tensors[name].view(-1)[0] = torch.nan
        actual, wanted = run(chosen, tensors, backend), run(chosen, tensors, "reference")
        for x, y in zip(actual[0], wanted[0], strict=True):
            assert torch.equal(x.isnan(), y.isnan()), (name, x, y)
        for x, y in zip(actual[1], wanted[1], strict=True):
            assert (x.isnan() | ~y.isnan()).all(), (name, x, y)


@each_backend
@pytest.mark.parametrize("place", [0, _CHUNK, 2 * _CHUNK + 3])
def test_a_nan_logit_in_a_chunk_of_minus_infinities(backend, place):
    logits = torch.randn(2, 3 * _CHUNK, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    start = place // _CHUNK * _CHUNK
    logits[:, start : start + _CHUNK] = -torch.inf
    logits[0, place] = torch.nan
    targets = torch.full((2,), (start + _CHUNK) % (3 * _CHUNK), device=DEVICE)
    for rows in (logits, logits.repeat(200, 1)):  # a row by several threads, and by one
        x = rows.clone().requires_grad_()
        logp, entropy = ops.logprobs_and_entropy(x, targets.repeat(len(rows) // 2), backend=backend)
        (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
        for result in (logp, entropy, gradient):
            assert result[0].isnan().all() and result[1].isfinite().all()
        if backend == BACKENDS[-1]:
            break
