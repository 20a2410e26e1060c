import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles.whiten import whiten as oracle
from tests.tolerance import WHITEN_ABSOLUTE, WHITEN_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels._whiten import WhitenInputs, _operator

LAYOUTS = st.sampled_from(["dense", "sliced", "transposed"])


@st.composite
def cases(draw, backend: str):
    """A tensor below, at and past one tile, some of it masked, with NaN in the masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    shape = draw(
        st.sampled_from([(0,), (1,), (2,), (37,), (4096,), (9001,), (0, 4), (1, 1), (3, 4097)])
        | st.tuples(st.integers(1, 40), st.integers(1, 40))
    )
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 50.0]))
    x = (x + draw(st.sampled_from([0.0, 3.0]))).to(dtype)
    mask = None
    kept = draw(st.sampled_from([None, 0.0, 0.05, 0.7]))
    if kept is not None:
        mask = torch.rand(shape, generator=generator) < kept
        x = x.masked_fill(~mask, draw(st.sampled_from([torch.nan, torch.inf])))
        mask = strided(mask.to(draw(st.sampled_from([torch.bool, torch.uint8]))), draw(LAYOUTS))
    options = {"shift_mean": draw(st.booleans()), "eps": draw(st.sampled_from([1e-8, 1e-3]))}
    return strided(x, draw(LAYOUTS)), mask, options


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 200))
    @given(cases(backend), st.booleans())
    def check(case, broadcast):
        x, mask, options = case
        x = x.detach().requires_grad_()
        exact = x.detach().double().requires_grad_()
        result = ops.whiten(x, mask, **options, backend=backend)
        wanted = reference.whiten(exact, mask, **options)
        keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
        assert result.dtype == torch.float32 and (result[~keep] == 0).all()
        valid = exact.detach()[keep]
        # where the deviations are small beside the mean, so are the digits that they have left
        spread = valid.std().item() if valid.numel() > 1 else 1.0
        offset = 1.0 + valid.abs().mean().item() / max(spread, 1e-4) if valid.numel() else 1.0
        absolute = WHITEN_ABSOLUTE * offset
        if not options["shift_mean"]:
            absolute *= 1.0 + (valid.abs().mean().item() if valid.numel() else 0.0)
        assert_close(result, wanted, relative=WHITEN_RELATIVE, absolute=absolute, what="whitened")

        upstream = torch.linspace(-1, 2, max(x.numel(), 1), device=DEVICE)[: x.numel()]
        upstream = upstream.new_ones(()).expand(x.shape) if broadcast else upstream.view(x.shape)
        result.backward(upstream)
        gradient = torch.zeros_like(exact)
        if wanted.requires_grad:
            wanted.backward(upstream.double())
            gradient = exact.grad
        assert (x.grad[~keep] == 0).all()
        # dx is a difference of terms of the size of g / s
        size = 1.0 / max(spread, options["eps"] ** 0.5) + 1.0
        assert_close(
            x.grad, gradient, relative=WHITEN_RELATIVE, absolute=absolute * size, what="gradient"
        )

    check()


@each_backend
def test_masked_slots_filled_like_valid_ones(backend):
    @settings(max_examples=examples(backend, 50))
    @given(cases(backend))
    def check(case):
        x, mask, options = case
        filled = ops.whiten(x, mask, **options, fill_masked=True, backend=backend)
        if mask is None:
            assert torch.equal(filled, ops.whiten(x, **options, backend=backend))
            return
        assert not filled[~mask.bool()].isfinite().any()
        x = x.nan_to_num(7.0, 7.0)
        filled = ops.whiten(x, mask, **options, fill_masked=True, backend=backend)
        wanted = reference.whiten(x.double(), mask, **options, fill_masked=True)
        valid = x.double()[mask.bool()]
        spread = valid.std().item() if valid.numel() > 1 else 0.0
        # a masked slot may be far away from the valid ones, beside their spread
        scale = (8.0 + float(x.double().abs().amax()) if x.numel() else 0.0) / max(
            spread, options["eps"] ** 0.5
        )
        absolute = WHITEN_ABSOLUTE * max(scale, 1.0)
        assert_close(filled, wanted, relative=WHITEN_RELATIVE, absolute=absolute, what="filled")

    check()


def test_filled_slots_have_no_gradient():
    with pytest.raises(ValueError, match="x requires grad"):
        ops.whiten(torch.ones(3, requires_grad=True), fill_masked=True)


@settings(max_examples=50)
@given(cases("cpu"))
def test_the_reference_equals_the_oracle(case):
    x, mask, options = case
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    wanted = oracle(x.double().cpu().numpy(), keep.cpu().numpy(), **options)
    actual = reference.whiten(x.double(), mask, **options).cpu()
    assert_close(actual, torch.from_numpy(wanted), relative=1e-9, absolute=1e-7, what="whitened")


@each_backend
@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_equal_elements_have_no_deviation(backend, size, eps):
    # 0.1 summed seven times and divided by seven is not 0.1
    x = torch.full((size,), 0.1, device=DEVICE)
    assert (ops.whiten(x, eps=eps, backend=backend) == 0).all()
    assert torch.equal(ops.whiten(x, shift_mean=False, eps=eps, backend=backend), x)


@each_backend
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_that_is_valid_poisons_all(backend, shift_mean, value):
    x = torch.randn(5000, device=DEVICE)
    x[4711] = value
    mask = torch.ones(5000, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    result = ops.whiten(x, mask, shift_mean=shift_mean, backend=backend)
    assert result[1:].isnan().all() and result[0] == 0


@each_backend
def test_a_common_offset_changes_nothing(backend):
    x = torch.randint(-50, 50, (3, 3000), device=DEVICE).float() / 64
    plain = ops.whiten(x, backend=backend)
    assert torch.allclose(ops.whiten(x + 1024, backend=backend), plain, atol=1e-3)
    assert torch.allclose(ops.whiten(x * 4, backend=backend), plain, atol=1e-5)
    assert torch.allclose(plain.std(), torch.ones((), device=DEVICE), atol=1e-5)


@each_backend
def test_more_tiles_than_partial_results(backend, monkeypatch):
    rows = 2600
    if backend == "triton":
        from warpo.kernels._triton import whiten

        monkeypatch.setattr(whiten, "MAX_PROGRAMS", 4)
        rows = 11
    # a row is at least one tile
    x = torch.randn(rows, 4, device=DEVICE)[:, :3]
    wanted = reference.whiten(x.double())
    result = ops.whiten(x, backend=backend)
    assert_close(result, wanted, relative=WHITEN_RELATIVE, absolute=1e-5, what="whitened")


@each_backend
def test_every_run_gives_the_same_bits(backend):
    x = torch.randn(30, 4000, device=DEVICE, requires_grad=True)
    upstream = torch.randn(30, 4000, device=DEVICE)

    def run():
        result = ops.whiten(x, backend=backend)
        return result, *torch.autograd.grad(result, x, upstream)

    first = run()
    for _ in range(3 if backend == "triton" else 20):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of the CPU kernels")
def test_the_number_of_threads_changes_no_bit():
    x = torch.randn(100000, requires_grad=True)
    upstream = torch.randn(100000)
    runs, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        result = ops.whiten(x)
        runs.append((result, *torch.autograd.grad(result, x, upstream)))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@each_backend
def test_opcheck(backend):
    x = torch.randn(3, 50, device=DEVICE, requires_grad=True)
    for mask in (None, torch.rand(3, 50, device=DEVICE) < 0.5):
        inputs = WhitenInputs(x=x, mask=mask, shift_mean=False, eps=1e-8, backend=backend)
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(_operator, inputs, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def whitened(x):
        return ops.whiten(x * 2, backend=backend)

    compiled = torch.compile(whitened, fullgraph=True, backend="aot_eager")
    for size in (5, 6, 70):
        x = torch.randn(2, size, device=DEVICE, requires_grad=True)
        assert torch.equal(whitened(x), compiled(x))
        upstream = torch.randn(2, size, device=DEVICE)
        (gradient,) = torch.autograd.grad(compiled(x), x, upstream)
        (wanted,) = torch.autograd.grad(whitened(x), x, upstream)
        assert torch.equal(gradient, wanted)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[None],), {}, r"x must be 1-D or 2-D, got \(1, 2, 3\): pass x.flatten\(1\)"),
        ((X.long(),), {}, "x must be float32"),
        ((X, X[0] > 0), {}, r"mask must be of shape \(2, 3\), got \(3,\)"),
        ((X, X), {}, "mask must be bool | uint8"),
        ((X,), {"eps": -1.0}, "eps must be >= 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.whiten(*arguments, **options)
