import inspect
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip(
    "openrlhf", reason="OpenRLHF is not installed: make peers; then make test-integrations"
)
import openrlhf.models.actor as actor  # noqa: E402
from openrlhf.models import loss, utils  # noqa: E402

from tests.integrations.openrlhf.cases import (  # noqa: E402
    DTYPES,
    LAYOUTS,
    SEEDS,
    laid_out,
    pair,
)
from warpo.kernels.integrations import openrlhf  # noqa: E402
from warpo.kernels.integrations.patching import wrap  # noqa: E402

LOGITS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 70))
# what torch.compile compiled: the tests would wait for it at every shape
COMPUTE_ENTROPY = utils.compute_entropy._torchdynamo_orig_callable


def make_logits(shape, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return laid_out(logits, layout), laid_out(labels, layout)


@given(LOGITS, DTYPES, LAYOUTS, st.sampled_from([1.0, 0.7]), SEEDS)
def test_log_probs_from_logits(shape, dtype, layout, temperature, seed):
    logits, labels = make_logits(shape, dtype, layout, seed)
    original, ours = pair("log_probs_from_logits")
    compare(original, ours, logits, labels, temperature, differentiable=[0], scale=30.0)


def test_log_probs_of_impossible_tokens():
    logits = torch.randn(2, 3, 9)
    logits[..., 4] = -torch.inf
    labels = torch.tensor([[0, 4, 1], [2, 3, 4]])
    original, ours = pair("log_probs_from_logits")
    compare(original, ours, logits, labels, scale=10.0)


@pytest.mark.parametrize("name", ["log_probs_from_logits"])
def test_the_callers_logits_are_divided(name):
    """Later uses of the logits are of the policy at the temperature."""
    weights = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    found = []
    for function in pair(name):
        logits = 3 * weights
        logprobs = function(logits, labels, 0.5)
        total = logprobs.sum() + COMPUTE_ENTROPY(logits).sum()
        (gradient,) = torch.autograd.grad(total, weights)
        found.append((logits, logprobs, gradient))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@given(LOGITS, DTYPES, LAYOUTS, SEEDS)
def test_compute_entropy(shape, dtype, layout, seed):
    logits, _ = make_logits(shape, dtype, layout, seed)
    _, ours = pair("compute_entropy")
    compare(COMPUTE_ENTROPY, ours, logits, differentiable=[0], scale=30.0)


def test_entropy_of_impossible_tokens():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    original, ours = pair("compute_entropy")
    assert original(logits).isnan()
    torch.testing.assert_close(ours(logits), torch.tensor([2.0]).log())


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
    DTYPES,
    LAYOUTS,
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from(["legacy", "unbiased", "weighted"]),
    st.sampled_from([0.1, 6.0]),
    SEEDS,
)
def test_compute_approx_kl(shape, dtype, layout, estimator, gradient, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, *shape, generator=generator)
    logp, base, old = (laid_out((spread * x).to(dtype), layout) for x in rows)
    original, ours = pair("compute_approx_kl")

    def exact(*args):
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            return original(*args)

    compare(
        original,
        ours,
        logp,
        base,
        old if gradient == "weighted" else None,
        estimator,
        gradient != "legacy",
        differentiable=[0, 1],
        scale=10.0,
        exact_original=exact,
    )


def test_an_unknown_estimator_is_the_librarys_error():
    _, ours = pair("compute_approx_kl")
    with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
        ours(torch.zeros(2), torch.zeros(2), None, "k4", True)


@given(LOGITS, DTYPES, LAYOUTS, st.booleans(), SEEDS)
def test_language_model_loss(shape, dtype, layout, ignores, seed):
    logits, labels = make_logits(shape, dtype, layout, seed)
    if ignores:
        labels = labels.masked_fill(torch.rand(labels.shape) < 0.4, -100)
    original, ours = pair("GPTLMLoss.forward", loss.GPTLMLoss())
    compare(original, ours, logits, labels, differentiable=[0], scale=30.0)


@pytest.mark.parametrize(
    ("name", "bound", "arguments"),
    [
        ("log_probs_from_logits", (), (torch.randn(2, 3, 5).double(), torch.zeros(2, 3).long())),
        ("compute_entropy", (), (torch.randn(2, 3, 5).double(),)),
        ("compute_approx_kl", (), (torch.randn(2, 3).double(), torch.randn(2, 3))),
        (
            "GPTLMLoss.forward",
            (loss.GPTLMLoss(),),
            (torch.randn(2, 3, 5).double(), torch.zeros(2, 3).long()),
        ),
    ],
)
def test_passed_through(name, bound, arguments):
    calls = []

    def library(*args):
        calls.append(args)
        return "theirs"

    assert wrap(openrlhf.library.replacements[name], library)(*bound, *arguments) == "theirs"
    (call,) = calls
    assert call[: len(bound) + len(arguments)] == (*bound, *arguments)


def test_every_holder_of_a_name_is_patched():
    with openrlhf.patch():
        assert actor.log_probs_from_logits is utils.log_probs_from_logits
        assert loss.PolicyLoss.forward.__warpo__ is not None
        assert set(openrlhf.patched()) == set(openrlhf.names())
        assert inspect.signature(loss.PolicyLoss.forward) == SIGNATURE
    assert openrlhf.patched() == ()


SIGNATURE = inspect.signature(loss.PolicyLoss.forward)

WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from warpo.kernels.integrations import openrlhf
names = [name for name in openrlhf.names() if not name.startswith("RemoteExperienceMaker")]
openrlhf.patch(only=names)
assert set(openrlhf.patched()) == set(names)
"""


def test_the_rest_is_patched_without_ray():
    subprocess.run([sys.executable, "-c", WITHOUT_RAY], check=True)
