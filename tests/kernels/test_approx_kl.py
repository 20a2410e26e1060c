import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.oracles import approx_kl as oracle
from tests.tolerance import assert_close
from warpo.kernels import ops, reference
from warpo.kernels.objectives import KL_ESTIMATORS

NAMES = ("logprobs", "ref_logprobs", "weight")


@st.composite
def cases(draw, backend: str):
    """Tensors of up to three dimensions, differences far below and above 1, NaN in masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    shape = draw(st.sampled_from([(), (0,), (1,), (1500,), (3, 40), (2, 1100), (2, 3, 4)]))
    # float16 ends at e^11
    spread = draw(st.sampled_from([1e-4, 0.5, 2.0 if dtype == torch.float16 else 20.0]))
    base = -torch.rand(shape, generator=generator)
    tensors = {
        "logprobs": base,
        "ref_logprobs": base + spread * torch.randn(shape, generator=generator),
    }
    estimator = draw(st.sampled_from(KL_ESTIMATORS))
    options = {
        "estimator": estimator,
        "gradient": draw(st.sampled_from(["estimator", "k2"][: 1 + (estimator != "reverse_k3")])),
        "limit": draw(st.sampled_from([math.inf, 10.0, 0.1])),
    }
    if options["gradient"] == "k2" and draw(st.booleans()):
        tensors["weight"] = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        bad = draw(st.sampled_from([torch.nan, torch.inf]))
        tensors = {name: x.masked_fill(~mask, bad) for name, x in tensors.items()}
        tensors["mask"] = mask
    layout = "dense" if len(shape) > 2 else draw(st.sampled_from(["dense", "sliced", "transposed"]))
    if not shape:
        layout = "dense"
    return {
        name: strided(x.to(dtype) if name in NAMES else x, layout) for name, x in tensors.items()
    }, options


def run(function, tensors, options):
    """(value, gradients) with a gradient from above that varies."""
    given = {name: x.detach() for name, x in tensors.items()}
    leaves = [given[name].requires_grad_() for name in NAMES[:2]]
    value = function(**given, **options)
    upstream = torch.linspace(-1, 2, value.numel(), device=DEVICE).view(value.shape)
    return value, torch.autograd.grad(value, leaves, upstream.to(value.dtype))


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 150))
    @given(cases(backend))
    def check(case):
        tensors, options = case
        exact = {n: x.double() if n in NAMES else x for n, x in tensors.items()}
        wanted, wanted_gradients = run(reference.approx_kl, exact, options)
        value, gradients = run(ops.approx_kl, tensors, options | {"backend": backend})
        assert value.dtype == torch.float32
        # at the bound either side is right
        d = exact["ref_logprobs"].detach() - exact["logprobs"].detach()
        free = reference.approx_kl(-d, torch.zeros_like(d), options["estimator"])
        decided = ((free.abs() - options["limit"]).abs() > 1e-4).logical_or(free.isnan())
        # the rounding of a difference of 100 is 4e-6 of its exponential
        assert_close(value, wanted, relative=1e-5, absolute=1e-13, what="value")
        for name, gradient, other in zip(NAMES, gradients, wanted_gradients, strict=False):
            assert gradient.dtype == tensors[name].dtype
            # absolute: steps of subnormal float16
            assert_close(gradient[decided], other[decided], relative=1e-5, absolute=6e-8, what=name)

    check()


@pytest.mark.parametrize("limit", [math.inf, 2.0])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_reference_equals_numpy(estimator, limit):
    logprobs, refs = -3 * torch.rand(2, 60, dtype=torch.float64, device=DEVICE)
    logprobs.requires_grad_()
    value = reference.approx_kl(logprobs, refs, estimator, limit=limit)
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    wanted = oracle.approx_kl(logprobs.detach().cpu().numpy(), refs.cpu().numpy(), estimator, limit)
    np.testing.assert_allclose(value.detach().cpu().numpy(), wanted[0], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(gradient.cpu().numpy(), wanted[1], rtol=1e-13, atol=1e-15)


@each_backend
@pytest.mark.parametrize("limit", [math.inf, 10.0])
def test_an_overflow_of_exp_leaves_the_gradient_finite(backend, limit):
    logprobs = torch.tensor([-200.0, -math.inf, 0.0, 0.0], device=DEVICE, requires_grad=True)
    refs = torch.tensor([0.0, 0.0, -math.inf, -200.0], device=DEVICE)
    value = ops.approx_kl(logprobs, refs, limit=limit, backend=backend)
    bound = [limit] * 4 if limit < math.inf else [math.inf] * 3 + [199.0]
    assert value.tolist() == bound
    (gradient,) = torch.autograd.grad(value, logprobs, torch.ones_like(value))
    assert gradient.tolist() == [0.0, 0.0, 0.0, 0.0 if limit < math.inf else 1.0]


@each_backend
def test_the_gradient_passes_at_the_bound(backend):
    logprobs = torch.tensor([-2.0, -1.0, 1.0, 2.0], device=DEVICE, requires_grad=True)
    value = ops.approx_kl(logprobs, torch.zeros_like(logprobs), "k1", limit=1.0, backend=backend)
    assert value.tolist() == [-1.0, -1.0, 1.0, 1.0]
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert gradient.tolist() == [0.0, 1.0, 1.0, 0.0]


@each_backend
def test_opcheck(backend):
    logprobs, refs = torch.randn(2, 3, 4, device=DEVICE).unbind()
    arguments = (logprobs.clone().requires_grad_(), refs, None, logprobs > 0)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.warpo.approx_kl.default, (*arguments, 3, False, 10.0, backend), test_utils=utils
    )
    torch.library.opcheck(
        torch.ops.warpo.approx_kl_backward.default,
        (logprobs, *arguments[1:], refs, True, False, 3, False, 10.0, backend),
        test_utils=utils,
    )


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, X[0]), {}, r"ref_logprobs must be of shape \(2, 3\), got \(3,\)"),
        ((X, X.double()), {}, "ref_logprobs must be float32"),
        ((X, X, "k4"), {}, "estimator must be one of k1, k2, k3, reverse_k3; got 'k4'"),
        ((X, X), {"gradient": "k3"}, "gradient must be one of estimator, k2; got 'k3'"),
        ((X, X, "reverse_k3"), {"gradient": "k2"}, "set it to 'estimator'"),
        ((X, X), {"weight": X}, "set gradient to 'k2', or weight to None"),
        ((X, X), {"limit": 0.0}, "limit must be > 0, got 0.0"),
        ((X, X), {"mask": X}, r"mask must be bool \| uint8, got float32"),
        (
            (X, X),
            {"gradient": "k2", "weight": X.clone().requires_grad_()},
            r"pass weight.detach\(\)",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.approx_kl(*arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def kl(logprobs, refs):
        return ops.approx_kl(logprobs * 2, refs, limit=1.0, backend=backend)

    compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
    for shape in ((2, 4), (3, 6), (5, 9)):
        logprobs, refs = torch.randn(2, *shape, device=DEVICE).unbind()
        logprobs.requires_grad_()
        wanted, found = kl(logprobs, refs), compiled(logprobs, refs)
        assert torch.equal(wanted, found)
        gradients = [torch.autograd.grad(x.sum(), logprobs)[0] for x in (wanted, found)]
        assert torch.equal(*gradients)
