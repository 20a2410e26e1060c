import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, each_backend, examples
from tests.kernels.scans import (
    assert_gradients_close,
    assert_scan_close,
    leaves,
    on_rows,
    scan_cases,
)
from tests.oracles import returns as oracle
from warpo.kernels import ops, reference

PER_STEP = {"discounted_returns": ("rewards",), "lambda_returns": ("rewards", "values")}
each_operation = pytest.mark.parametrize("operation", PER_STEP)


def numbers(operation: str) -> st.SearchStrategy:
    gammas = st.sampled_from([1.0, 0.99, 0.5, 0.0])
    if operation == "discounted_returns":
        return st.fixed_dictionaries({"gamma": gammas})
    lambdas = st.sampled_from([1.0, 0.95, 0.0])
    return st.fixed_dictionaries({"gamma": gammas, "gae_lambda": lambdas})


@each_backend
@each_operation
def test_values_and_gradients_equal_float64(backend, operation):
    @settings(max_examples=examples(backend, 60))
    @given(scan_cases(backend, PER_STEP[operation]), numbers(operation))
    def check(case, discounts):
        floats, options, shape = case
        options = options | discounts
        mine, exact = leaves(floats)
        result = getattr(ops, operation)(**mine, **options, backend=backend)
        wanted = getattr(reference, operation)(**exact, **options)
        assert_scan_close(result, wanted, operation)
        upstream = torch.randn(shape, device=DEVICE)
        result.backward(upstream)
        if wanted.requires_grad:  # else there are no steps
            (wanted * upstream).sum().backward()
        assert_gradients_close(mine, exact)

    check()


@each_operation
def test_the_reference_equals_the_book(operation):
    @settings(max_examples=40)
    @given(scan_cases("cpu", PER_STEP[operation]), numbers(operation))
    def check(case, discounts):
        floats, options, _ = case
        exact = {name: x.double().cpu() for name, x in floats.items()} | options | discounts
        (wanted,) = on_rows(getattr(oracle, operation), exact, PER_STEP[operation], 1)
        found = getattr(reference, operation)(**exact)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    check()


@each_backend
def test_a_penalty_at_the_end_of_a_response_reaches_every_token(backend):
    rewards = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, -2]], device=DEVICE)
    returns = ops.discounted_returns(rewards, gamma=1.0, backend=backend)
    assert returns.tolist() == [[1, 1, 1, 0], [-2, -2, -2, -2]]


@each_backend
@pytest.mark.parametrize("time_dim", [0, 1])
def test_nothing_of_a_later_episode_reaches_one_that_has_ended(backend, time_dim):
    rewards = torch.zeros(130, 40, device=DEVICE)
    rewards[120] = torch.nan
    ended = torch.zeros(130, 40, dtype=torch.bool, device=DEVICE)
    ended[80] = True
    if time_dim == 1:
        rewards, ended = rewards.t(), ended.t()
    returns = ops.discounted_returns(
        rewards, gamma=0.9, terminated=ended, time_dim=time_dim, backend=backend
    )
    assert (returns.narrow(time_dim, 0, 81) == 0).all()


@each_backend
def test_lambda_returns_are_advantages_plus_values(backend):
    rewards, values = torch.randn(2, 5, 70, device=DEVICE)
    returns = ops.lambda_returns(rewards, values, gamma=0.99, gae_lambda=0.9, backend=backend)
    found = ops.gae(rewards, values, gamma=0.99, gae_lambda=0.9, backend=backend)
    assert torch.equal(returns, found.returns)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def returns(rewards, values, gamma):
        lambdas = ops.lambda_returns(
            rewards, values * 2, gamma=gamma, gae_lambda=0.9, time_dim=0, backend=backend
        )
        return ops.discounted_returns(rewards, gamma=gamma, backend=backend) + lambdas

    compiled = torch.compile(returns, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        rewards, values = torch.randn(2, 3, steps, device=DEVICE, requires_grad=True)
        assert torch.equal(returns(rewards, values, 0.9), compiled(rewards, values, 0.9))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "operation, arguments, options, message",
    [
        ("discounted_returns", (X,), {"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0"),
        ("discounted_returns", (X[0],), {}, "rewards must be 2-D"),
        ("discounted_returns", (X,), {"truncated": X.bool()}, "go together"),
        (
            "lambda_returns",
            (X, X),
            {"gae_lambda": -1.0},
            r"gae_lambda must be in \[0, 1\], got -1.0",
        ),
        ("lambda_returns", (X, X[0]), {}, r"values must be of shape \(2, 3\)"),
        ("lambda_returns", (X, X), {"mask_mode": ""}, "one of carry, zero, compact"),
    ],
)
def test_bad_arguments_are_named(operation, arguments, options, message):
    numbers = {"gamma": 1.0} | ({"gae_lambda": 1.0} if operation == "lambda_returns" else {})
    with pytest.raises(ValueError, match=message):
        getattr(ops, operation)(*arguments, **(numbers | options))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_lambda_returns_need_values(backend):
    rewards = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(TypeError, match="values must be a Tensor, got NoneType"):
        ops.lambda_returns(rewards, None, gamma=0.9, gae_lambda=0.5, backend=backend)
