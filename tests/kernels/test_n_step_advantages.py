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
from tests.oracles import n_step_advantages as oracle
from warpo.kernels import ops, reference
from warpo.kernels._n_step_advantages import NStepAdvantagesInputs, _operator
from warpo.kernels._scan import Steps, as_inputs

PER_STEP = ("rewards", "values")
NUMBERS = st.fixed_dictionaries(
    {
        "n": st.sampled_from([1, 2, 3, 7, 64, 1000]),
        "gamma": st.sampled_from([1.0, 0.99, 0.5, 0.0]),
    }
)


@each_backend
def test_values_equal_float64(backend):
    @settings(max_examples=examples(backend, 120))
    @given(scan_cases(backend, PER_STEP, ends=False), NUMBERS)
    def check(case, numbers):
        floats, options, _ = case
        if backend == "triton" and DEVICE == "cpu":  # its interpreter takes a second for 500 steps
            numbers = numbers | {"n": min(numbers["n"], 7)}
        found = ops.n_step_advantages(**floats, **options, **numbers, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = reference.n_step_advantages(**exact, **options, **numbers)
        for name, a, b in zip(found._fields, found, wanted, strict=True):
            assert_scan_close(a, b, name, scale=100)

    check()


@each_backend_slow_triton
def test_every_mask_mode_in_every_layout_equals_float64(backend):
    for floats, options, _ in every_case(PER_STEP, ends=False):
        found = ops.n_step_advantages(**floats, **options, n=5, gamma=0.9, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = reference.n_step_advantages(**exact, **options, n=5, gamma=0.9)
        for name, a, b in zip(found._fields, found, wanted, strict=True):
            assert_scan_close(a, b, name)


@settings(max_examples=40)
@given(scan_cases("cpu", PER_STEP, ends=False), NUMBERS)
def test_the_reference_equals_the_definition_of_the_paper(case, numbers):
    floats, options, _ = case
    exact = {n: x.double().cpu() for n, x in floats.items()} | options | numbers
    wanted = on_rows(oracle.n_step_advantages, exact, PER_STEP)
    for a, b in zip(reference.n_step_advantages(**exact), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_backend
@pytest.mark.parametrize("n, gae_lambda", [(1, 0.0), (40, 1.0), (2**31 - 1, 1.0)])
def test_its_ends_are_those_of_gae(backend, n, gae_lambda):
    rewards, values = torch.randn(2, 3, 40, device=DEVICE)
    options = {"gamma": 0.97, "last_values": torch.randn(3, device=DEVICE)}
    found = ops.n_step_advantages(rewards, values, n=n, **options, backend=backend)
    wanted = ops.gae(rewards, values, gae_lambda=gae_lambda, **options, backend=backend)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_backend
def test_a_nan_reaches_the_steps_whose_window_it_is_in(backend):
    rewards, values = torch.ones(2, 1, 20, device=DEVICE)
    rewards[0, 12] = torch.nan
    found = ops.n_step_advantages(rewards, values, n=3, gamma=0.9, backend=backend)
    assert found.advantages[0].isnan().nonzero().flatten().tolist() == [10, 11, 12]


@each_backend
@pytest.mark.parametrize("steps", [9, 300])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend, steps):
    tensors = torch.randn(2, 5, steps, device=DEVICE)
    batch = ops.n_step_advantages(*tensors, n=4, gamma=0.99, backend=backend)
    for row in (0, 4):
        alone = ops.n_step_advantages(*tensors[:, row, None], n=4, gamma=0.99, backend=backend)
        assert torch.equal(alone.advantages[0], batch.advantages[row])


@each_backend
def test_opcheck(backend):
    rewards, values = torch.randn(2, 3, 9, device=DEVICE)
    inputs = NStepAdvantagesInputs(
        rewards=rewards,
        values=values,
        last_values=torch.randn(3, 1, device=DEVICE),
        steps=as_inputs(Steps(mask=torch.rand(3, 9, device=DEVICE) < 0.7), 0.9, 1.0),
        n=2,
        backend=backend,
    )
    opcheck(_operator, inputs)


X = torch.zeros(2, 3)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"rewards": X[0]}, "rewards must be 2-D"),
        ({"values": X[0]}, r"values must be of shape \(2, 3\), got \(3,\)"),
        ({"values": X.clone().requires_grad_()}, r"values requires grad.*values.detach\(\)"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"n": 0}, r"n must be an integer in \[1, 2\*\*31\), got 0"),
        ({"n": 1.5}, r"n must be an integer in \[1, 2\*\*31\), got 1.5"),
        ({"last_values": X[0]}, r"last_values must be of shape \(2,\), got \(3,\)"),
        ({"mask_mode": "skip"}, "mask_mode must be one of carry, zero, compact; got 'skip'"),
    ],
)
def test_bad_arguments_are_named(backend, changed, message):
    with pytest.raises(ValueError, match=message):
        ops.n_step_advantages(
            **{"rewards": X, "values": X, "n": 2, "gamma": 0.9} | changed, backend=backend
        )
