import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.oracles import value_loss as oracle
from tests.tolerance import ROUNDING, SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels.objectives import AGGREGATIONS

NAMES = ("values", "old_values", "returns")
CLIPPED = ops.VALUE_METRICS.index("clipped")


@st.composite
def options(draw):
    return {
        "clip_range": draw(st.sampled_from([None, 0.0, 0.2])),
        "loss": draw(st.sampled_from(["mse", "huber"])),
        "huber_delta": draw(st.sampled_from([0.3, 1.0])),
        "aggregation": draw(st.sampled_from(AGGREGATIONS)),
        "denominator": draw(st.sampled_from([1.0, 7.0, 0.0])),
    }


@st.composite
def cases(draw, backend: str):
    """Tensors of one dtype, padded or packed, with NaN in masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 17, 130, 600]), max_size=5))
    shape = (sum(lengths),) if packed else (len(lengths), draw(st.sampled_from([0, 1, 3, 40, 600])))
    base = torch.randn(shape, generator=generator) + draw(st.sampled_from([0.0, 10.0]))
    tensors = {name: base + 0.5 * torch.randn(shape, generator=generator) for name in NAMES}
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        bad = draw(st.sampled_from([torch.nan, torch.inf]))
        tensors = {name: x.masked_fill(~mask, bad) for name, x in tensors.items()}
        tensors["mask"] = mask
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    tensors = {
        name: strided(x.to(dtype) if name in NAMES else x, layout) for name, x in tensors.items()
    }
    if packed:
        starts = list(itertools.accumulate(lengths, initial=0))
        tensors["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return tensors, draw(options())


def exact_loss(tensors, options):
    """(values, loss, metrics) in float64 from the reference."""
    exact = {n: x.detach().double() if n in NAMES else x for n, x in tensors.items()}
    values = exact.pop("values").requires_grad_()
    loss, metrics = reference.value_loss(
        values,
        exact.pop("old_values"),
        exact.pop("returns"),
        torch.tensor(options["denominator"], dtype=torch.float64, device=DEVICE),
        **exact,
        clip_range=options["clip_range"],
        huber_delta=options["huber_delta"] if options["loss"] == "huber" else torch.inf,
        sequence_mean=options["aggregation"] == "sequence-mean-token-mean",
    )
    return values, loss, metrics


def undecided(tensors, options) -> torch.Tensor:
    """Tokens at which float32 may choose another branch than float64."""
    v, old, target = (tensors[name].detach().double() for name in NAMES)
    if options["clip_range"] is None:
        return torch.zeros_like(v, dtype=torch.bool)
    c = options["clip_range"]
    near = v.clamp(old - c, old + c)
    near_bound = ((v - old).abs() - c).abs() < 1e-5
    return near_bound | (((near - target).abs() - (v - target).abs()).abs() < 1e-5) & (near != v)


@each_backend
def test_loss_gradient_and_metrics_equal_float64(backend):
    @settings(max_examples=examples(backend, 120))
    @given(cases(backend))
    def check(case):
        tensors, options = case
        exact, loss_64, metrics_64 = exact_loss(*case)
        mine = dict(tensors)
        values = mine.pop("values").detach().requires_grad_()
        loss, metrics = ops.value_loss(
            values, mine.pop("old_values"), mine.pop("returns"), **options, **mine, backend=backend
        )
        assert loss.dtype == metrics.dtype == torch.float32
        assert_close(loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=1e-6)
        others = [i for i in range(len(ops.VALUE_METRICS)) if i != CLIPPED]
        # returns near 10: the error of a mean is relative to them
        assert_close(
            metrics[others],
            metrics_64[others],
            what="metrics",
            relative=SUM_RELATIVE,
            absolute=2e-5,
        )
        (loss * 0.5).backward()
        (gradient_64,) = torch.autograd.grad(loss_64 * 0.5, exact)
        doubtful = undecided(tensors, options)
        if not doubtful.any():
            assert metrics[CLIPPED] == metrics_64[CLIPPED]
        assert_close(
            values.grad.masked_fill(doubtful, 0),
            gradient_64.masked_fill(doubtful, 0),
            what="gradient",
            relative=SUM_RELATIVE,
            absolute=2e-6 + ROUNDING[values.dtype] * 1e-4,
        )

    check()


@settings(max_examples=60)
@given(cases("cpu"))
def test_the_reference_is_the_paper(case):
    tensors, options = case
    options["denominator"] = options["denominator"] or 1.0
    exact, loss, metrics = exact_loss(tensors, options)
    (gradient,) = torch.autograd.grad(loss, exact)
    mask = tensors.get("mask", torch.ones_like(exact, dtype=torch.bool))
    arrays = [x.detach().double().cpu().numpy() for x in (exact, *map(tensors.get, NAMES[1:]))]
    arrays += [mask.cpu().numpy(), gradient.cpu().numpy()]
    if "cu_seqlens" in tensors:
        starts = tensors["cu_seqlens"].tolist()
        arrays = [[x[a:b] for a, b in itertools.pairwise(starts)] for x in arrays]
    *inputs, gradient = [list(x) for x in arrays]
    if not inputs[0]:
        return
    wanted, gradients, wanted_metrics = oracle.value_loss(
        *inputs,
        clip_range=options["clip_range"],
        huber_delta=options["huber_delta"] if options["loss"] == "huber" else None,
        aggregation=options["aggregation"],
        denominator=options["denominator"],
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    for mine, theirs in zip(gradient, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-15)
    read = ops.value_metrics(metrics)
    assert read.pop("loss/value") == loss.item()
    assert read == pytest.approx(wanted_metrics, rel=1e-9, abs=1e-9)


def test_the_backend_reference_is_the_reference():
    values, old, returns = torch.randn(3, 4, 9, device=DEVICE, dtype=torch.bfloat16)
    starts = torch.tensor([0, 3, 3, 9], dtype=torch.int32, device=DEVICE)
    for tensors, starts_or_none in (((values, old, returns), None), ((values[0],) * 3, starts)):
        one, two = (
            ops.value_loss(*tensors, cu_seqlens=starts_or_none, loss="huber", backend=backend)
            for backend in ("reference", BACKENDS[0])
        )
        assert one.metrics.dtype == torch.float32
        assert torch.allclose(one.metrics, two.metrics, rtol=1e-5, atol=1e-5)


@each_backend
def test_ties_follow_autograd(backend):
    """At both bounds, inside, and outside where both branches are equal."""
    values = torch.tensor([[0.5, 1.5, 1.25, 2.0, 0.0, 2.0, 0.0]], device=DEVICE)
    old = torch.ones_like(values)
    # the clipped value is as far from the last two returns as the value
    returns = torch.tensor([[3.0, -1.0, 3.0, 1.75, 0.25, 3.0, 3.0]], device=DEVICE)
    mine, twin = (values.clone().requires_grad_() for _ in range(2))
    ops.value_loss(
        mine, old, returns, clip_range=0.5, denominator=1.0, backend=backend
    ).loss.backward()
    clipped = twin.clamp(old - 0.5, old + 0.5)
    torch.max((twin - returns) ** 2, (clipped - returns) ** 2).sum().mul(0.5).backward()
    assert twin.grad[0, 3] == 0.125 and twin.grad[0, 5] == 0, "no tie and no clipped token"
    assert torch.equal(mine.grad, twin.grad)


@each_backend
@pytest.mark.parametrize("which", range(3))
def test_a_nan_that_is_not_masked_reaches_loss_and_gradient(backend, which):
    tensors = [torch.full((2, 3), x, device=DEVICE) for x in (1.0, 0.9, 2.0)]
    tensors[which][0, 1] = torch.nan
    values = tensors[0].requires_grad_()
    loss, metrics = ops.value_loss(values, *tensors[1:], denominator=1.0, backend=backend)
    loss.backward()
    assert loss.isnan() and values.grad[0, 1].isnan() and values.grad[1].isfinite().all()


@each_backend
def test_moments_do_not_cancel(backend):
    """Var(R) = 1e-6 at a mean of 100: in float32 the sum of squares would keep none of it."""
    returns = 100 + 1e-3 * torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    values = returns + 5e-4 * torch.randn(8, 500, generator=torch.Generator().manual_seed(1))
    returns, values = returns.to(DEVICE), values.to(DEVICE)
    parts = [
        ops.value_loss(values[rows], None, returns[rows], clip_range=None, backend=backend).metrics
        for rows in (slice(0, 8), slice(0, 1), slice(1, 8))
    ]
    wanted = 1 - (returns - values).double().var() / returns.double().var()
    for metrics in (parts[0], ops.merge_value_metrics(parts[1:])):
        explained = ops.value_metrics(metrics)["value/explained_variance"]
        assert explained == pytest.approx(wanted.item(), abs=1e-2)


@each_backend
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(backend, aggregation):
    values, old, returns = torch.randn(3, 6, 10, device=DEVICE)
    values.requires_grad_()
    lengths = torch.tensor([10, 3, 1, 7, 0, 9], device=DEVICE)
    mask = torch.arange(10, device=DEVICE) < lengths[:, None]

    def loss_of(rows):
        return ops.value_loss(
            values[rows],
            old[rows],
            returns[rows],
            mask=mask[rows],
            aggregation=aggregation,
            denominator=30.0,
            backend=backend,
        )

    whole = loss_of(slice(0, 6))
    (gradient,) = torch.autograd.grad(whole.loss, values)
    parts = [loss_of(rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    sum(part.loss for part in parts).backward()
    assert torch.equal(values.grad, gradient)
    merged = ops.merge_value_metrics([part.metrics for part in parts])
    assert torch.allclose(merged, whole.metrics, rtol=1e-5, atol=1e-5)


@each_backend
def test_packed_equals_padded_bit_for_bit_in_the_gradient(backend):
    values, old, returns = torch.randn(3, 4, 9, device=DEVICE)
    mask = torch.arange(9)[None] < torch.tensor([9, 2, 0, 5])[:, None]
    mask = mask.to(DEVICE)
    starts = torch.tensor([0, 9, 11, 11, 16], dtype=torch.int32, device=DEVICE)
    padded, packed = values.clone().requires_grad_(), values[mask].requires_grad_()
    options = {"aggregation": "sequence-mean-token-mean", "backend": backend}
    one = ops.value_loss(padded, old, returns, mask=mask, **options)
    two = ops.value_loss(packed, old[mask], returns[mask], cu_seqlens=starts, **options)
    one.loss.backward()
    two.loss.backward()
    assert torch.equal(padded.grad[mask], packed.grad) and (padded.grad[~mask] == 0).all()
    assert torch.allclose(one.metrics, two.metrics, rtol=1e-6, atol=1e-6)


def long_sequences():
    """Padded: a GPU takes a row in parts. Of the second row a whole part is masked, of the third
    all but the last token, and of the fourth all. Packed: ends at the end of a part and beside it.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 3073, generator=generator) < 0.7
    mask[1, 1024:2048] = False
    mask[2:] = False
    mask[2, -1] = True
    starts = itertools.accumulate([0, 1024, 0, 1025, 1023, 2049, 1, 3000, 0], initial=0)
    yield torch.randn(3, 4, 3073, generator=generator), mask, None
    packed = torch.randn(3, 8122, generator=generator)
    yield packed, torch.rand(8122, generator=generator) < 0.9, torch.tensor(list(starts)).int()


@each_backend
def test_long_sequences_equal_float64(backend):
    for tensors, mask, starts in long_sequences():
        values, old, returns = tensors.to(DEVICE)
        rest = {
            "mask": mask.to(DEVICE),
            "cu_seqlens": None if starts is None else starts.to(DEVICE),
        }
        options = {
            "clip_range": None,
            "loss": "huber",
            "huber_delta": 1.0,
            "aggregation": "sequence-mean-token-mean",
            "denominator": 7.0,
        }
        named = {"values": values, "old_values": old, "returns": returns, **rest}
        exact, loss_64, metrics_64 = exact_loss(named, options)
        leaf = values.clone().requires_grad_()
        loss, metrics = ops.value_loss(leaf, old, returns, **options, **rest, backend=backend)
        loss.backward()
        (wanted,) = torch.autograd.grad(loss_64, exact)
        assert_close(loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=1e-6)
        assert_close(metrics, metrics_64, what="metrics", relative=SUM_RELATIVE, absolute=2e-5)
        assert_close(leaf.grad, wanted, what="gradient", relative=SUM_RELATIVE, absolute=1e-9)
        if starts is not None:
            continue
        for row in range(len(values)):  # alone, a row is cut into as many parts as there can be
            alone = values[row : row + 1].clone().requires_grad_()
            others = (old[row : row + 1], returns[row : row + 1])
            own = mask[row : row + 1].to(DEVICE)
            ops.value_loss(alone, *others, mask=own, **options, backend=backend).loss.backward()
            assert torch.equal(alone.grad[0], leaf.grad[row])


@each_backend
def test_more_sequences_than_parts_equal_float64(backend, monkeypatch):
    """Beyond as many as a GPU would cut into parts, and past one round of the merge of rows."""
    sequences = 530
    if backend == "triton":  # the interpreter takes milliseconds per program
        launcher = importlib.import_module("warpo.kernels._triton.value_loss")
        monkeypatch.setattr(launcher, "MIN_VALUE_PARTIALS", 128)
        sequences = 130
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, sequences, 2, generator=generator).to(DEVICE)
    loss, metrics = ops.value_loss(values, old, returns, clip_range=None, backend=backend)
    wanted, metrics_64 = reference.value_loss(
        values.double(),
        None,
        returns.double(),
        torch.tensor(2.0 * sequences, dtype=torch.float64, device=DEVICE),
        mask=None,
        cu_seqlens=None,
        clip_range=None,
        huber_delta=torch.inf,
        sequence_mean=False,
    )
    assert_close(loss, wanted, what="loss", relative=SUM_RELATIVE, absolute=1e-6)
    assert_close(metrics, metrics_64, what="metrics", relative=SUM_RELATIVE, absolute=2e-5)


@each_backend
def test_runs_are_equal_bit_for_bit(backend):
    values, old, returns = torch.randn(3, 9, 300, device=DEVICE)
    runs = [ops.value_loss(values, old, returns, backend=backend) for _ in range(3)]
    assert all(torch.equal(run.metrics, runs[0].metrics) for run in runs)


@each_backend
def test_without_valid_tokens_loss_and_gradient_are_zero(backend):
    values = torch.full((2, 3), torch.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    constant = values.detach()
    for aggregation in AGGREGATIONS[:3]:
        values.grad = None
        loss, metrics = ops.value_loss(
            values, constant, constant, mask=mask, aggregation=aggregation, backend=backend
        )
        loss.backward()
        assert loss == 0 and (values.grad == 0).all()
        assert all(value == 0 for value in ops.value_metrics(metrics).values())


@each_backend
def test_opcheck(backend):
    values, old, returns = torch.randn(3, 2, 5, device=DEVICE)
    values.requires_grad_()
    denominator = torch.tensor(3.0, device=DEVICE)
    numbers = (True, 0.2, 1.0, 0.0, denominator, True, backend)
    mask = torch.rand(2, 5, device=DEVICE) < 0.7
    starts = torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE)
    flat = [x.detach().reshape(1, 10).requires_grad_(x.requires_grad) for x in (values, old)]
    for tensors in (
        (values, old, returns, mask, None),
        (*flat, returns.reshape(1, 10), None, starts),
    ):
        torch.library.opcheck(
            torch.ops.warpo.value_loss.default,
            (*tensors, *numbers),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(values, old, returns, mask):
        return ops.value_loss(
            values * 1.5, old, returns, mask=mask, denominator=4.0, backend=backend
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        values, old, returns = torch.randn(3, 3, steps, device=DEVICE)
        values.requires_grad_()
        mask = torch.rand(3, steps, device=DEVICE) < 0.8
        results = []
        for function in (loss, compiled):
            values.grad = None
            value = function(values, old, returns, mask)
            value.backward()
            results.append((value.detach(), values.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, STARTS = torch.zeros(2, 3), torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, None, X), {}, "clip_range = 0.2 needs old_values; or set it to None"),
        ((X, X, X), {"clip_range": -0.1}, "clip_range must be >= 0, or None, got -0.1"),
        ((X, X, X), {"loss": "mae"}, "loss must be one of mse, huber; got 'mae'"),
        ((X, X, X), {"huber_delta": 0.0}, "huber_delta must be > 0, got 0.0"),
        ((X, X, X), {"aggregation": "mean"}, "aggregation must be one of token-mean.*got 'mean'"),
        ((X, X, X), {"aggregation": AGGREGATIONS[3]}, "needs denominator = sequences x a constant"),
        ((X, X, X), {"denominator": -1.0}, "denominator must be >= 0, got -1.0"),
        ((X, X[:1], X), {}, r"old_values must be of shape \(2, 3\), got \(1, 3\)"),
        ((X, X, X[:, :2]), {}, r"returns must be of shape \(2, 3\), got \(2, 2\)"),
        ((X[0], X[0], X[0]), {}, r"values must be \(B, T\), or \(N,\) together with cu_seqlens"),
        ((X, X, X), {"cu_seqlens": STARTS}, r"with cu_seqlens values must be \(N,\)"),
        ((X[0], X[0], X[0]), {"cu_seqlens": STARTS.long()}, "cu_seqlens must be int32"),
        ((X, X, X), {"mask": X}, r"mask must be bool \| uint8"),
        ((X, X.clone().requires_grad_(), X), {}, r"pass old_values.detach\(\)"),
        ((X, X, X.clone().requires_grad_()), {}, r"pass returns.detach\(\)"),
        ((X.double(), X, X), {}, "values must be float32"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.value_loss(*arguments, **options)
