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

LOOPS = ("generalized_advantage_estimate", "td1_return_estimate", "td_lambda_return_estimate")
VECTORISED = ("vec_generalized_advantage_estimate", "vec_td_lambda_return_estimate", "reward2go")
# served through a function that they call
CALLERS = (
    "vec_td1_return_estimate", "td1_advantage_estimate", "vec_td1_advantage_estimate",
    "td_lambda_advantage_estimate", "vec_td_lambda_advantage_estimate",
)  # fmt: skip
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
        original, ours("vtrace_advantage_estimate"), scale=10.0,
        rho_thresh=rho_thresh, c_thresh=c_thresh, **only_known(original, keywords),
    )  # fmt: skip
