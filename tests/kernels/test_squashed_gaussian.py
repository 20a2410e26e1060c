import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    dtypes,
    each_backend,
    each_backend_slow_triton,
    examples,
    strided,
)
from tests.oracles import squashed_gaussian as oracle
from tests.tolerance import ROUNDING, SQUASHED_RELATIVE, assert_close
from warpo.kernels import ops, reference


@st.composite
def cases(draw, backend: str):
    """mean, log_std, noise of one dtype, the bounds, and gradients of both results or of one."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    columns = draw(st.sampled_from([0, 1, 2, 6, 17, 33, 1500]))
    shape = (draw(st.sampled_from([0, 1, 3, 70] if columns < 100 else [1, 3])), columns)
    scales = (draw(st.sampled_from([0.1, 1.0, 20.0])), draw(st.sampled_from([0.5, 8.0])), 1.0)
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    tensors = [
        strided((scale * torch.randn(shape, generator=generator)).to(dtype), layout)
        for scale in scales
    ]
    bounds = draw(st.sampled_from([(-20.0, 2.0), (-5.0, 2.0), (-1.0, -1.0)]))
    upstream = [torch.randn(size, generator=generator).to(DEVICE) for size in (shape, shape[:1])]
    if shape[0]:
        upstream[1] = upstream[1][:1].expand(shape[0])
    wanted = draw(st.sampled_from([(0,), (1,), (0, 1)]))
    return tensors, dict(zip(("log_std_min", "log_std_max"), bounds, strict=True)), upstream, wanted


def results_and_gradients(function, tensors, upstream, wanted):
    mean, log_std = (x.detach().requires_grad_() for x in tensors[:2])
    results = function(mean, log_std, tensors[2])
    torch.autograd.backward(
        [results[i] for i in wanted], [upstream[i].to(results[i].dtype) for i in wanted]
    )
    return [*(x.detach() for x in results), mean.grad, log_std.grad]


def magnitudes(tensors, bounds, upstream, wanted):
    """Of what is added up in each of the four results, element by element, in float64."""
    mean, log_std, noise = (x.detach().double() for x in tensors)
    s = log_std.clamp(*bounds)
    spread = (s.exp() * noise).abs()
    # an ulp of s is |s| ulp of exp(s)
    u = 1 + mean.abs() + (1 + s.abs()) * spread
    slope = torch.zeros_like(mean)
    own = torch.zeros_like(mean)
    if 0 in wanted:
        slope = slope + upstream[0].double().abs()
    if 1 in wanted:
        own = own + upstream[1].double().abs()[:, None]
    of_mean = 1e-3 + (slope + 2 * own) * u
    return u, (noise.square() + s.abs() + 2 * u).sum(1) + 1, of_mean, of_mean * (1 + spread) + own


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 150))
    @given(cases(backend))
    def check(case):
        tensors, bounds, upstream, wanted = case
        found = results_and_gradients(
            lambda *x: ops.squashed_gaussian(*x, **bounds, backend=backend),
            tensors,
            upstream,
            wanted,
        )
        assert found[0].dtype == found[1].dtype == torch.float32
        exact = results_and_gradients(
            lambda *x: reference.squashed_gaussian(*x, **bounds),
            [x.double() for x in tensors],
            upstream,
            wanted,
        )
        scales = magnitudes(tensors, bounds.values(), upstream, wanted)
        for name, a, b, scale in zip(
            ("actions", "logprobs", "mean.grad", "log_std.grad"), found, exact, scales, strict=True
        ):
            # a half below its normal range keeps an absolute 2^-25
            subnormal = 2.0**-25 if a.dtype == torch.float16 else 0.0
            assert_close(
                a.double() / scale,
                b / scale,
                relative=ROUNDING[a.dtype],
                absolute=SQUASHED_RELATIVE + 1e3 * subnormal,
                what=name,
            )

    check()


def test_the_reference_equals_numpy():
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    tensors[1] = 2 * tensors[1] - 1
    upstream = [torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]
    bounds = {"log_std_min": -3.0, "log_std_max": 0.5}
    assert (tensors[1] > 0.5).any() and (tensors[1] < -3).any()
    found = results_and_gradients(
        lambda *x: reference.squashed_gaussian(*x, **bounds), tensors, upstream, (0, 1)
    )
    wanted = oracle.squashed_gaussian(*(x.numpy() for x in (*tensors, *upstream)), **bounds)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-9, atol=1e-10)


@each_backend
def test_the_density_of_the_actions_has_integral_one(backend):
    """Over actions of one component, by the trapezoid rule between u = mean +- 6 std."""
    noise = torch.linspace(-6, 6, 4001, device=DEVICE)[:, None]
    mean, log_std = torch.full_like(noise, 0.3), torch.full_like(noise, math.log(0.7))
    actions, logprobs = ops.squashed_gaussian(mean, log_std, noise, backend=backend)
    integral = torch.trapezoid(logprobs.double().exp(), actions[:, 0].double())
    assert integral.item() == pytest.approx(1, abs=1e-5)


@each_backend
def test_logprobs_are_finite_where_the_action_rounds_to_one(backend):
    mean = torch.tensor([[-300.0], [-12.0], [12.0], [300.0]], device=DEVICE, requires_grad=True)
    zeros = torch.zeros_like(mean, requires_grad=True)
    actions, logprobs = ops.squashed_gaussian(mean, zeros, zeros.detach(), backend=backend)
    logprobs.sum().backward()
    assert actions.flatten().tolist() == [-1, -1, 1, 1]
    wanted = 2 * mean.detach()[:, 0].abs() - math.log(4) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(logprobs.detach(), wanted)
    assert mean.grad.flatten().tolist() == [-2, -2, 2, 2]


@each_backend
def test_small_actions_keep_their_digits(backend):
    mean = torch.logspace(-30, 0, 61, device=DEVICE)[:, None]
    zeros = torch.zeros_like(mean)
    actions, _ = ops.squashed_gaussian(mean, zeros, zeros, backend=backend)
    torch.testing.assert_close(actions, mean.double().tanh().float(), rtol=1e-6, atol=0)


@each_backend
def test_the_gradient_of_a_saturated_action_keeps_its_digits(backend):
    mean = torch.linspace(-30, 30, 61, device=DEVICE)[:, None].requires_grad_()
    zeros = torch.zeros_like(mean)
    actions, _ = ops.squashed_gaussian(mean, zeros, zeros, backend=backend)
    actions.sum().backward()
    wanted = mean.detach().double().cosh() ** -2
    torch.testing.assert_close(mean.grad, wanted.float(), rtol=1e-5, atol=0)


@each_backend
def test_the_clamp_passes_the_gradient_as_torch_does(backend):
    log_std = torch.tensor([[-2.5, -2.0, 0.0, 1.0, 1.5]], device=DEVICE)
    mean, noise = torch.full_like(log_std, 0.3), torch.full_like(log_std, -0.8)
    gradients = []
    for function in (ops.squashed_gaussian, reference.squashed_gaussian):
        leaf = log_std.clone().requires_grad_()
        options = {"backend": backend} if function is ops.squashed_gaussian else {}
        actions, logprobs = function(
            mean, leaf, noise, log_std_min=-2.0, log_std_max=1.0, **options
        )
        gradients += torch.autograd.grad(actions.sum() + logprobs.sum(), leaf)
    mine, wanted = gradients
    assert (mine == 0).tolist() == [[True, False, False, False, True]]
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


@each_backend_slow_triton
@pytest.mark.parametrize("columns", [1, 6, 17, 1030])
def test_every_row_alone_equals_the_row_in_the_batch_bit_for_bit(backend, columns):
    tensors = list(torch.randn(3, 4, columns, device=DEVICE))
    upstream = [torch.ones(4, columns, device=DEVICE), torch.ones(4, device=DEVICE)]

    def run(rows):
        return results_and_gradients(
            lambda *x: ops.squashed_gaussian(*x, backend=backend),
            [x[rows] for x in tensors],
            [x[rows] for x in upstream],
            (0, 1),
        )

    whole = run(slice(None))
    for row in range(4):
        for a, b in zip(whole, run(slice(row, row + 1)), strict=True):
            assert torch.equal(a[row : row + 1], b)


@each_backend
@pytest.mark.parametrize("which", range(3))
def test_a_nan_stays_in_its_row(backend, which):
    tensors = [torch.full((3, 4), x, device=DEVICE) for x in (0.1, -0.5, 1.0)]
    tensors[which][1, 2] = torch.nan
    ones = [torch.ones(3, 4, device=DEVICE), torch.ones(3, device=DEVICE)]
    actions, logprobs, grad_mean, _ = results_and_gradients(
        lambda *x: ops.squashed_gaussian(*x, backend=backend), tensors, ones, (0, 1)
    )
    for result in (actions, grad_mean):
        assert result[1, 2].isnan() and result.isnan().sum() == 1
    assert logprobs.isnan().tolist() == [False, True, False]


@each_backend
def test_one_log_std_for_all_states_needs_no_copy(backend):
    mean, noise = torch.randn(2, 5, 3, device=DEVICE)
    log_std = torch.randn(3, device=DEVICE, requires_grad=True)
    twin = log_std.detach().clone().requires_grad_()
    ops.squashed_gaussian(mean, log_std.expand(5, 3), noise, backend=backend)[1].sum().backward()
    reference.squashed_gaussian(mean, twin.expand(5, 3), noise)[1].sum().backward()
    torch.testing.assert_close(log_std.grad, twin.grad)


@each_backend
def test_opcheck(backend):
    mean, log_std, noise = torch.randn(3, 4, 5, device=DEVICE)
    mean.requires_grad_()
    log_std.requires_grad_()
    torch.library.opcheck(
        torch.ops.warpo.squashed_gaussian.default,
        (mean, log_std, noise, -1.0, 0.5, backend),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(mean, log_std, noise):
        actions, logprobs = ops.squashed_gaussian(mean * 1.5, log_std, noise, backend=backend)
        return (0.2 * logprobs - actions.sum(1)).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (4, 6, 9):
        mean, log_std, noise = torch.randn(3, rows, 3, device=DEVICE)
        leaves = [mean.requires_grad_(), log_std.requires_grad_()]
        results = []
        for function in (loss, compiled):
            value = function(*leaves, noise)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], X[0], X[0]), {}, r"mean must be \(B, A\), got \(3,\)"),
        ((X, X[:1], X), {}, r"log_std must be of shape \(2, 3\), got \(1, 3\)"),
        ((X, X, X[:, :2]), {}, r"noise must be of shape \(2, 3\), got \(2, 2\)"),
        ((X.double(), X, X), {}, "mean must be float32"),
        ((X, X, X.clone().requires_grad_()), {}, r"pass noise.detach\(\)"),
        (
            (X, X, X),
            {"log_std_min": 1.0, "log_std_max": -1.0},
            "log_std_min must be <= log_std_max, got 1.0 and -1.0",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.squashed_gaussian(*arguments, **options)
