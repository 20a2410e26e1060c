import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    each_backend,
    each_backend_slow_triton,
    examples,
)
from tests.kernels.opcheck import opcheck
from tests.kernels.scans import assert_scan_close, every_case, on_rows, scan_cases
from tests.oracles import off_policy_returns as oracle
from warpo.kernels import ops, reference
from warpo.kernels._off_policy_returns import OffPolicyReturnsInputs, _operator
from warpo.kernels._scan import Steps, as_inputs

PER_STEP = ("rewards", "logprobs", "old_logprobs")


def scaled(floats: dict) -> dict:
    """Ratios near 1: nothing bounds their product, of hundreds of steps here."""
    return {n: x if "logprobs" not in n else 0.05 * x for n, x in floats.items()}


@each_backend
def test_values_equal_float64(backend):
    @settings(max_examples=examples(backend, 100))
    @given(scan_cases(backend, PER_STEP, ends=False), st.sampled_from([1.0, 0.99, 0.0]))
    def check(case, gamma):
        floats, options, _ = case
        floats = scaled(floats)
        found = ops.off_policy_returns(**floats, **options, gamma=gamma, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = reference.off_policy_returns(**exact, **options, gamma=gamma)
        assert_scan_close(found, wanted, "returns", scale=100)

    check()


@each_backend_slow_triton
def test_every_mask_mode_in_every_layout_equals_float64(backend):
    for floats, options, _ in every_case(PER_STEP, ends=False):
        floats = scaled(floats)
        found = ops.off_policy_returns(**floats, **options, gamma=0.9, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = reference.off_policy_returns(**exact, **options, gamma=0.9)
        assert_scan_close(found, wanted, "returns")


@settings(max_examples=40)
@given(scan_cases("cpu", PER_STEP, ends=False), st.sampled_from([1.0, 0.99, 0.0]))
def test_the_reference_equals_the_definition_of_the_paper(case, gamma):
    floats, options, _ = case
    exact = {n: x.double().cpu() for n, x in scaled(floats).items()} | options | {"gamma": gamma}
    (wanted,) = on_rows(oracle.off_policy_returns, exact, PER_STEP, 1)
    found = reference.off_policy_returns(**exact)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@each_backend
@pytest.mark.parametrize("steps", [4, 40])
def test_the_sum_of_the_causal_gradient_is_prefix_ratio_times_returns(backend, steps):
    """Q_t = C_t r_t + Q_{t+1} with C_t = prod_{u <= t} w_u is C_t G_t."""
    rewards, logp, old = 0.3 * torch.randn(3, 2, steps, device=DEVICE)
    prefix = (logp - old).double().cumsum(1).exp()
    wanted = (prefix * rewards).flip(1).cumsum(1).flip(1)
    found = prefix * ops.off_policy_returns(rewards, logp, old, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each_backend
def test_on_policy_it_is_the_discounted_return(backend):
    logp, rewards = torch.randn(2, 4, 90, device=DEVICE)
    found = ops.off_policy_returns(rewards, logp, logp, gamma=0.9, backend=backend)
    wanted = reference.discounted_returns(rewards.double(), 0.9)
    assert_scan_close(found, wanted, "returns")


@each_backend
@pytest.mark.parametrize("steps", [5, 40])
def test_the_ratio_of_a_step_does_not_weigh_its_own_return(backend, steps):
    rewards, logp = torch.ones(2, 2, steps, device=DEVICE)
    logp[:, 0] = torch.nan
    found = ops.off_policy_returns(rewards, logp, torch.ones_like(logp), backend=backend)
    assert torch.allclose(found[:, 0], torch.full((2,), float(steps), device=DEVICE))


@each_backend
@pytest.mark.parametrize("steps", [9, 100])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend, steps):
    tensors = 0.1 * torch.randn(3, 21, steps, device=DEVICE)
    batch = ops.off_policy_returns(*tensors, backend=backend)
    for row in (0, 16, 20):
        alone = ops.off_policy_returns(*tensors[:, row : row + 1], backend=backend)
        assert torch.equal(alone[0], batch[row])


@each_backend
def test_opcheck(backend):
    rewards, logprobs, old_logprobs = torch.randn(3, 3, 9, device=DEVICE)
    flags = torch.rand(3, 9, device=DEVICE) < 0.7
    inputs = OffPolicyReturnsInputs(
        rewards=rewards,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        last_values=torch.randn(3, 1, device=DEVICE),
        steps=as_inputs(Steps(mask=flags), 0.9, 1.0),
        log_ratio_limit=20.0,
        backend=backend,
    )
    opcheck(_operator, inputs)


X = torch.zeros(2, 3)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"rewards": X[0]}, "rewards must be 2-D"),
        ({"logprobs": X[0]}, r"logprobs must be of shape \(2, 3\), got \(3,\)"),
        ({"old_logprobs": X.double()}, "old_logprobs must be float32 | bfloat16 | float16"),
        ({"logprobs": X.clone().requires_grad_()}, r"logprobs requires grad.*logprobs.detach\(\)"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"log_ratio_limit": 0.0}, r"log_ratio_limit must be in \(0, 80\], got 0.0"),
        ({"last_values": X[0]}, r"last_values must be of shape \(2,\), got \(3,\)"),
        ({"mask_mode": "skip"}, "mask_mode must be one of carry, zero, compact; got 'skip'"),
    ],
)
def test_bad_arguments_are_named(backend, changed, message):
    with pytest.raises(ValueError, match=message):
        ops.off_policy_returns(**dict.fromkeys(PER_STEP, X) | changed, backend=backend)
