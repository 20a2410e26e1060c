import math

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
from tests.oracles import vtrace as oracle
from warpo.kernels import ops, reference
from warpo.kernels._scan import Steps, as_inputs
from warpo.kernels._vtrace import VtraceInputs, _operator

PER_STEP = ("logprobs", "old_logprobs", "rewards", "values")
NUMBERS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([1.0, 0.99, 0.5, 0.0]),
        "gae_lambda": st.sampled_from([1.0, 0.9, 0.0]),
        "rho_max": st.sampled_from([1.0, 2.0, math.inf]),
        "c_max": st.sampled_from([1.0, 0.7]),
        "pg_rho_max": st.sampled_from([1.0, math.inf]),
    }
)


def call(function, arguments: dict, **options):
    given = dict(arguments)
    tensors = [given.pop(name) for name in PER_STEP]
    return function(*tensors, **given, **options)


@each_backend
def test_values_equal_float64(backend):
    @settings(max_examples=examples(backend, 120))
    @given(scan_cases(backend, PER_STEP), NUMBERS)
    def check(case, numbers):
        floats, options, _ = case
        result = call(ops.vtrace, floats | options | numbers, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = call(reference.vtrace, exact | options | numbers)
        # the ratios of the test reach 50
        for name, a, b in zip(("returns", "advantages"), result, wanted, strict=True):
            assert_scan_close(a, b, name, scale=100)

    check()


@each_backend_slow_triton
def test_every_mask_mode_in_every_layout_equals_float64(backend):
    numbers = {"gamma": 0.9, "gae_lambda": 0.9, "rho_max": 2.0, "c_max": 0.7, "pg_rho_max": 1.5}
    for floats, options, _ in every_case(PER_STEP):
        result = call(ops.vtrace, floats | options | numbers, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = call(reference.vtrace, exact | options | numbers)
        for name, a, b in zip(("returns", "advantages"), result, wanted, strict=True):
            assert_scan_close(a, b, name)


@settings(max_examples=40)
@given(scan_cases("cpu", PER_STEP), NUMBERS)
def test_the_reference_equals_the_definition_of_the_paper(case, numbers):
    floats, options, _ = case
    exact = {name: x.double().cpu() for name, x in floats.items()} | options | numbers
    wanted = on_rows(oracle.vtrace, exact, PER_STEP)
    for a, b in zip(call(reference.vtrace, exact), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_backend
def test_on_policy_it_is_the_lambda_return(backend):
    logp, rewards, values = torch.randn(3, 4, 90, device=DEVICE)
    found = ops.vtrace(logp, logp, rewards, values, gamma=0.9, gae_lambda=0.8, backend=backend)
    wanted = reference.lambda_returns(rewards.double(), values.double(), 0.9, 0.8)
    assert_scan_close(found.returns, wanted, "returns")


@each_backend
def test_a_far_ratio_stays_finite(backend):
    rewards, values = torch.randn(2, 2, 40, device=DEVICE)
    logp = torch.full((2, 40), -1.0, device=DEVICE)
    old = torch.tensor([[-900.0], [0.0]], device=DEVICE).expand(2, 40)
    found = ops.vtrace(logp, old, rewards, values, gamma=0.9, backend=backend)
    assert found.returns.isfinite().all() and found.advantages.isfinite().all()


@each_backend
@pytest.mark.parametrize("steps", [9, 100, pytest.param(1200, marks=pytest.mark.slow)])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend, steps):
    tensors = torch.randn(4, 21, steps, device=DEVICE)
    batch = ops.vtrace(*tensors, gamma=0.99, backend=backend)
    for row in (0, 16, 20):
        alone = ops.vtrace(*tensors[:, row : row + 1], gamma=0.99, backend=backend)
        assert torch.equal(alone.returns[0], batch.returns[row])
        assert torch.equal(alone.advantages[0], batch.advantages[row])


@each_backend
def test_opcheck(backend):
    tensors = torch.randn(4, 3, 9, device=DEVICE)
    flags = torch.rand(3, 9, device=DEVICE) < 0.3
    logprobs, old_logprobs, rewards, values = tensors
    inputs = VtraceInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        rewards=rewards,
        values=values,
        last_values=None,
        final_values=None,
        steps=as_inputs(Steps(mask=flags, terminated=flags), 0.9, 0.9),
        rho_max=1.0,
        c_max=1.0,
        pg_rho_max=1.0,
        log_ratio_limit=20.0,
        backend=backend,
    )
    opcheck(_operator, inputs)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def targets(logp, old, rewards, values, gamma):
        return ops.vtrace(logp, old, rewards * 2, values, gamma=gamma, backend=backend)

    compiled = torch.compile(targets, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        arguments = (*torch.randn(4, 3, steps, device=DEVICE), 0.9)
        for a, b in zip(targets(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(a, b)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"logprobs": X[0]}, "logprobs must be 2-D"),
        ({"old_logprobs": X[0]}, r"old_logprobs must be of shape \(2, 3\), got \(3,\)"),
        ({"rewards": X.double()}, "rewards must be float32 | bfloat16 | float16, got float64"),
        ({"values": X.clone().requires_grad_()}, r"values requires grad.*values.detach\(\)"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"gae_lambda": -0.1}, r"gae_lambda must be in \[0, 1\], got -0.1"),
        ({"rho_max": 0.0}, "rho_max must be > 0, got 0.0"),
        ({"c_max": math.nan}, "c_max must be > 0, got nan"),
        ({"pg_rho_max": -1.0}, "pg_rho_max must be > 0, got -1.0"),
        ({"log_ratio_limit": 100.0}, r"log_ratio_limit must be in \(0, 80\], got 100.0"),
        ({"truncated": X.bool()}, "truncated and final_values go together"),
        ({"mask_mode": "skip"}, "mask_mode must be one of carry, zero, compact; got 'skip'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(ops.vtrace, dict.fromkeys(PER_STEP, X) | {"gamma": 0.9} | changed)
