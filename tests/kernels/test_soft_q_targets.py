import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles import soft_q_targets as oracle
from tests.tolerance import SQUASHED_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels._soft_q_targets import SoftQTargetsInputs, _operator


@st.composite
def cases(draw, backend: str):
    """Rewards, ends, two values, logprobs; NaN or infinity after an end."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    count = draw(st.sampled_from([0, 1, 2, 255, 256, 257, 1500]))
    ends = torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    bad = draw(st.sampled_from([torch.nan, torch.inf]))
    rewards, *after = 10 * torch.randn(4, count, generator=generator)
    layout = draw(st.sampled_from(["dense", "sliced"]))
    after = [strided(x.masked_fill(ends, bad).to(dtype), layout) for x in after]
    flag = draw(st.sampled_from([torch.bool, torch.uint8]))
    numbers = {
        "alpha": draw(st.sampled_from([0.0, 0.2, 3.0])),
        "gamma": draw(st.sampled_from([0.0, 0.99, 1.0])),
    }
    return [strided(rewards.to(dtype), layout), strided(ends.to(flag), layout), *after], numbers


def exact_targets(tensors, alpha, gamma):
    rewards, ends, *after = (x.double() if x.is_floating_point() else x for x in tensors)
    temperature = torch.tensor(alpha, dtype=torch.float64, device=DEVICE)
    return reference.soft_q_targets(rewards, ends, *after, temperature, gamma)


@each_backend
def test_values_equal_float64(backend):
    @settings(max_examples=examples(backend, 100))
    @given(cases(backend), st.booleans())
    def check(case, on_device):
        tensors, numbers = case
        wanted = exact_targets(tensors, **numbers)
        if on_device:
            numbers["alpha"] = torch.tensor(numbers["alpha"], device=DEVICE)
        targets = ops.soft_q_targets(*tensors, **numbers, backend=backend)
        assert targets.dtype == torch.float32
        magnitude = 1 + sum(x.double().abs() for i, x in enumerate(tensors) if i != 1)
        scale = 4 * magnitude.nan_to_num(1.0, 1.0)
        assert_close(
            targets.double() / scale,
            wanted / scale,
            relative=0,
            absolute=SQUASHED_RELATIVE,
            what="targets",
        )

    check()


def test_the_reference_equals_numpy():
    rewards, *after = torch.randn(4, 50, dtype=torch.float64)
    ends = torch.arange(50) % 3 == 0
    after = [x.masked_fill(ends, torch.nan) for x in after]
    wanted = oracle.soft_q_targets(
        *(x.numpy() for x in (rewards, ends, *after)), alpha=0.3, gamma=0.9
    )
    found = exact_targets(
        [rewards.to(DEVICE), ends.to(DEVICE), *(x.to(DEVICE) for x in after)], 0.3, 0.9
    ).cpu()
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-14)


@each_backend
def test_a_terminated_transition_is_worth_its_reward_bit_for_bit(backend):
    rewards = torch.randn(70, device=DEVICE)
    bad = torch.full((70,), torch.nan, device=DEVICE)
    ends = torch.ones(70, dtype=torch.bool, device=DEVICE)
    targets = ops.soft_q_targets(
        rewards, ends, bad, bad, bad, alpha=0.2, gamma=0.9, backend=backend
    )
    assert torch.equal(targets, rewards)


@each_backend
@pytest.mark.parametrize("which", range(3))
def test_a_nan_of_a_transition_that_goes_on_stays_in_it(backend, which):
    after = [torch.ones(5, device=DEVICE) for _ in range(3)]
    after[which][2] = torch.nan
    ends = torch.zeros(5, dtype=torch.bool, device=DEVICE)
    targets = ops.soft_q_targets(
        after[0].new_zeros(5), ends, *after, alpha=0.2, gamma=0.9, backend=backend
    )
    assert targets.isnan().tolist() == [False, False, True, False, False]


@each_backend
def test_opcheck(backend):
    rewards, *after = torch.randn(4, 5, device=DEVICE)
    ends = torch.tensor([True, False] * 2 + [False], device=DEVICE)
    inputs = SoftQTargetsInputs(
        rewards=rewards,
        terminated=ends,
        next_q1=after[0],
        next_q2=after[1],
        next_logprobs=after[2],
        alpha=torch.tensor(0.2, device=DEVICE),
        gamma=0.9,
        backend=backend,
    )
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(_operator, inputs, test_utils=utils)


X, ENDS = torch.zeros(3), torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[None], ENDS, X, X, X), {}, r"rewards must be \(B,\), got \(1, 3\)"),
        ((X, ENDS, X[:, None], X, X), {}, r"next_q1 must be of shape \(3,\), got \(3, 1\)"),
        ((X, X, X, X, X), {}, r"terminated must be bool \| uint8, got float32"),
        ((X, ENDS, X, X.double(), X), {}, "next_q2 must be float32"),
        ((X, ENDS, X, X, X.clone().requires_grad_()), {}, r"pass next_logprobs.detach\(\)"),
        ((X, ENDS, X, X, X), {"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ((X, ENDS, X, X, X), {"alpha": X}, r"alpha must be of shape \(\), got \(3,\)"),
        ((X, ENDS, X, X, X), {"alpha": X[0].clone().requires_grad_()}, r"pass alpha.detach\(\)"),
        ((X, ENDS, X, X, X), {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.soft_q_targets(*arguments, **{"alpha": 0.2, "gamma": 0.9} | options)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def targets(rewards, ends, q1, q2, logprobs, alpha):
        return ops.soft_q_targets(
            rewards * 2, ends, q1, q2, logprobs, alpha=alpha.exp(), gamma=0.9, backend=backend
        )

    compiled = torch.compile(targets, fullgraph=True, backend="aot_eager")
    for count in (4, 6, 9):
        rewards, *after = torch.randn(4, count, device=DEVICE)
        given = (rewards, rewards > 0, *after, torch.tensor(-1.0, device=DEVICE))
        assert torch.equal(targets(*given), compiled(*given))
