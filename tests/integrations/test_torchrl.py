import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip(
    "torchrl", reason="torchrl is not installed: make peers; then make test-integrations"
)
from torchrl.objectives.value import advantages, functional  # noqa: E402

from warpo.kernels.integrations import torchrl  # noqa: E402
from warpo.kernels.integrations.patching import wrap  # noqa: E402

LOOPS = ("generalized_advantage_estimate", "td1_return_estimate", "td_lambda_return_estimate")
VECTORISED = ("vec_generalized_advantage_estimate", "vec_td_lambda_return_estimate", "reward2go")
# served through a function that they call
CALLERS = (
    "vec_td1_return_estimate",
    "td1_advantage_estimate",
    "vec_td1_advantage_estimate",
    "td_lambda_advantage_estimate",
    "vec_td_lambda_advantage_estimate",
)
SCANS = (*LOOPS, *VECTORISED, *CALLERS)


@st.composite
def steps(draw, terminated=("none", "some", "any")):
    """Keywords for any of the functions, time_dim among them."""
    lead = draw(st.sampled_from([(), (3,), (2, 3), (1, 2, 1)]))
    shape = (*lead, draw(st.integers(2, 40)), draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    time_dim = draw(st.sampled_from([-2, -1, 0, len(shape) - 2]))
    sliced = draw(st.booleans())

    def layout(x):
        if sliced:
            x = torch.stack([x, x], -1)[..., 0]
        return x.transpose(-2, time_dim)

    def floats():
        return layout(torch.randn(shape, generator=generator))

    done = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.9]))
    flags = torch.rand(shape, generator=generator) < 0.5
    kind = draw(st.sampled_from(terminated))
    return {
        "gamma": draw(st.sampled_from([0.99, 1.0, 0.5, torch.tensor(0.9)])),
        "lmbda": draw(st.sampled_from([0.95, 1.0, 0.3, 1, torch.tensor([0.8])])),
        "state_value": floats(),
        "next_state_value": floats(),
        "reward": floats(),
        "log_pi": floats(),
        "log_mu": floats(),
        "done": layout(done),
        "terminated": {"none": None, "some": layout(done & flags), "any": layout(flags)}[kind],
        "time_dim": time_dim,
    }


def only_known(function, keywords):
    known = function.__wrapped__ if hasattr(function, "__wrapped__") else function
    names = known.__code__.co_varnames[
        : known.__code__.co_argcount + known.__code__.co_kwonlyargcount
    ]
    return {name: value for name, value in keywords.items() if name in names}


def ours(name):
    """The function of the library as it is while patched."""

    @functools.wraps(getattr(functional, name))
    def call(*args, **kwargs):
        with torchrl.patch():
            return getattr(functional, name)(*args, **kwargs)

    return call


@given(keywords=steps(), name=st.sampled_from(SCANS))
def test_scans(keywords, name):
    original = getattr(functional, name)
    keywords = only_known(original, keywords)
    differentiable = [k for k in ("state_value", "next_state_value", "reward") if k in keywords]
    # temporal differences of the steps until the end add up
    compare(original, ours(name), differentiable=differentiable, scale=10.0, **keywords)


@given(
    keywords=steps(),
    rho_thresh=st.sampled_from([1.0, 0.3, torch.tensor(2.0), 1]),
    c_thresh=st.sampled_from([1.0, 5.0]),
)
def test_vtrace(keywords, rho_thresh, c_thresh):
    original = functional.vtrace_advantage_estimate
    compare(
        original,
        ours("vtrace_advantage_estimate"),
        scale=10.0,
        rho_thresh=rho_thresh,
        c_thresh=c_thresh,
        **only_known(original, keywords),
    )


SHAPE = (2, 5, 1)


def inputs(**changes):
    """Arguments of vec_generalized_advantage_estimate and the loop of its name, in their order."""
    generator = torch.Generator().manual_seed(0)
    value, next_value, reward = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    done = torch.zeros(SHAPE, dtype=torch.bool)
    done[0, 2] = True
    found = {
        "gamma": 0.9,
        "lmbda": 0.8,
        "state_value": value,
        "next_state_value": next_value,
        "reward": reward,
        "done": done,
        "terminated": done.clone(),
    }
    return found | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": torch.zeros(SHAPE, dtype=torch.float64)},
        {"reward": torch.zeros(SHAPE, dtype=torch.bfloat16)},
        {"gamma": torch.full(SHAPE, 0.9)},
        {"gamma": torch.tensor(0.9, dtype=torch.float64)},
        {"gamma": torch.tensor(0.9, requires_grad=True)},
        {"gamma": 1.5},
        {"reward": torch.zeros(2, 4, 1)},
        {"done": torch.zeros(SHAPE, dtype=torch.uint8)},
        {"time_dim": 3},
        {
            name: torch.zeros(1, dtype=torch.bool)
            if name in ("done", "terminated")
            else torch.ones(1)
            for name in ("state_value", "next_state_value", "reward", "done", "terminated")
        },
    ],
)
def test_what_is_not_served_goes_to_the_library_as_it_came(changes):
    passed = []

    def original(*args, **kwargs):
        passed.append((args, kwargs))
        return "the library's"

    wanted = inputs(**changes)
    for name in ("generalized_advantage_estimate", "vec_generalized_advantage_estimate"):
        assert wrap(torchrl.library.replacements[name], original)(**wanted) == "the library's"
        args, kwargs = passed.pop()
        found = dict(zip(wanted, args, strict=False)) | kwargs
        assert all(found[name] is value for name, value in wanted.items())


@pytest.mark.parametrize("name", ["td1_return_estimate", "td_lambda_return_estimate"])
def test_a_gamma_that_does_not_roll_goes_to_the_library(name):
    keywords = only_known(getattr(functional, name), inputs(rolling_gamma=False))
    with pytest.raises(RuntimeError, match="rolling_gamma=False"):
        ours(name)(**keywords)
    keywords["gamma"] = torch.full(SHAPE, 0.9)
    torch.testing.assert_close(
        ours(name)(**keywords), getattr(functional, name)(**keywords), rtol=0, atol=0
    )


def test_vtrace_that_needs_a_gradient_goes_to_the_library():
    values = inputs()
    del values["lmbda"]
    log_pi = torch.randn(SHAPE, requires_grad=True)
    found, _ = ours("vtrace_advantage_estimate")(log_pi=log_pi, log_mu=torch.zeros(SHAPE), **values)
    assert found.requires_grad


def test_under_vmap_the_library_is_called():
    reward, done = inputs()["reward"], inputs()["done"]

    def call(function):
        return torch.vmap(lambda value: function(0.9, value, reward, done))(torch.ones(3, *SHAPE))

    name = "td1_return_estimate"
    torch.testing.assert_close(call(ours(name)), call(getattr(functional, name)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "td_lambda_return_estimate"])
def test_compiled(name):
    keywords = only_known(getattr(functional, name), inputs())
    wanted = getattr(functional, name)(**keywords)
    with torchrl.patch():
        function = torch.compile(getattr(functional, name), backend="eager")
        torch.testing.assert_close(function(**keywords), wanted)


@pytest.mark.parametrize("name", (*LOOPS, *VECTORISED[:-1], "vtrace_advantage_estimate"))
def test_a_next_value_that_is_not_there_is_not_read(name):
    """Differs: NaN times 0 is NaN in torchrl."""
    keywords = inputs(log_pi=torch.zeros(SHAPE), log_mu=torch.zeros(SHAPE))
    keywords = only_known(getattr(functional, name), keywords)
    keywords["next_state_value"][0, 2] = 0
    wanted = getattr(functional, name)(**keywords)
    keywords["next_state_value"][0, 2] = torch.nan
    torch.testing.assert_close(ours(name)(**keywords), wanted)


@pytest.mark.parametrize("lmbda", [0.0, 0.99])
def test_powers_of_gamma_lambda_are_not_cut_off(lmbda):
    """Differs: the vectorised function fails at 0, and leaves out powers below 1e-7."""
    generator = torch.Generator().manual_seed(0)
    values = [1 + torch.rand(2, 2000, 1, generator=generator) for _ in range(3)]
    done = torch.zeros(2, 2000, 1, dtype=torch.bool)
    loop = functional.generalized_advantage_estimate
    exact = loop(0.99, lmbda, *(x.double() for x in values), done)[0]
    found = ours("vec_generalized_advantage_estimate")(0.99, lmbda, *values, done)[0]
    theirs = loop(0.99, lmbda, *values, done)[0]
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_modules_that_imported_the_functions_use_ours():
    before = advantages.vec_generalized_advantage_estimate
    with torchrl.patch():
        assert advantages.vec_generalized_advantage_estimate is not before
        assert set(torchrl.patched()) == set(torchrl.names())
    assert advantages.vec_generalized_advantage_estimate is before


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("GAE", {"lmbda": 0.95, "vectorized": True}),
        ("GAE", {"lmbda": 0.95, "vectorized": False}),
        ("TD1Estimator", {}),
        ("TDLambdaEstimator", {"lmbda": 0.95, "vectorized": True}),
        ("TDLambdaEstimator", {"lmbda": 0.95, "vectorized": False}),
    ],
)
def test_estimators(estimator, options):
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives import value

    torch.manual_seed(0)
    done = torch.rand(3, 7, 1) < 0.2
    after = {
        "obs": torch.randn(3, 7, 4),
        "reward": torch.randn(3, 7, 1),
        "done": done,
        "terminated": done & (torch.rand(3, 7, 1) < 0.5),
    }
    data = TensorDict({"obs": torch.randn(3, 7, 4), "next": after}, [3, 7], names=[None, "time"])
    net = TensorDictModule(torch.nn.Linear(4, 1), in_keys=["obs"], out_keys=["state_value"])
    module = getattr(value, estimator)(gamma=0.99, value_network=net, **options)
    wanted = module(data.clone())
    with torchrl.patch():
        found = module(data.clone())
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)
