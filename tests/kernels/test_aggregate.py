import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.oracles import aggregate as oracle
from tests.tolerance import ROUNDING, SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels.objectives import AGGREGATIONS


@st.composite
def cases(draw, backend: str):
    """Values padded or packed, tokens before and behind all sequences, NaN in masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    lengths = draw(st.lists(st.sampled_from([0, 1, 17, 600, 9000]), max_size=4))
    packed, around = draw(st.booleans()), draw(st.sampled_from([0, 3])) if lengths else 0
    steps = draw(st.sampled_from([0, 1, 40, 1300, 20000]))
    shape = (sum(lengths) + 2 * around,) if packed else (len(lengths), steps)
    values = torch.randn(shape, generator=generator) + draw(st.sampled_from([0.0, 10.0]))
    options = {"aggregation": draw(st.sampled_from(AGGREGATIONS))}
    denominators = [1.0, 7.0, 0.0]
    if options["aggregation"] != AGGREGATIONS[-1]:
        denominators.append(None)
    options["denominator"] = draw(st.sampled_from(denominators))
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        values = values.masked_fill(~mask, draw(st.sampled_from([torch.nan, torch.inf])))
        mask = mask.to(draw(st.sampled_from([torch.bool, torch.uint8, torch.float32])))
        if mask.dtype == torch.float32:
            mask *= torch.rand(shape, generator=generator) + 1e-3
        options["mask"] = strided(mask, layout)
    if packed:
        starts = list(itertools.accumulate(lengths, initial=around))
        options["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        values[:around] = values[sum(lengths) + around :] = torch.nan
    return strided(values.to(dtype), layout), options


def exact(values, denominator=None, **options):
    """(values, result) in float64 from the reference."""
    values = values.detach().double().requires_grad_()
    if denominator is not None:
        denominator = torch.tensor(denominator, dtype=torch.float64, device=DEVICE)
    return values, reference.aggregate(values, denominator=denominator, **options)


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 60))
    @given(cases(backend), st.booleans())
    def check(case, on_device):
        values, options = case
        wanted_values, wanted = exact(values, **options)
        (wanted_gradient,) = torch.autograd.grad(3 * wanted, wanted_values)
        if on_device and options["denominator"] is not None:
            options["denominator"] = torch.tensor(options["denominator"], device=DEVICE)
        values.requires_grad_()
        result = ops.aggregate(values, **options, backend=backend)
        assert result.dtype == torch.float32
        (gradient,) = torch.autograd.grad(3 * result, values)
        assert gradient.dtype == values.dtype
        # of the sum of the magnitudes: a sum near 0 has lost its digits
        scale = (wanted_gradient * wanted_values.nan_to_num(0, 0).detach()).abs().sum().clamp(min=1)
        assert_close(
            result.double() / scale,
            wanted / scale,
            relative=0,
            absolute=SUM_RELATIVE,
            what="result",
        )
        assert_close(
            gradient,
            wanted_gradient,
            relative=ROUNDING[torch.float32] + 1e-6,
            absolute=1e-7,
            what="gradient",
        )

    check()


@settings(max_examples=20)
@given(cases("cpu"))
def test_the_reference_equals_numpy(case):
    values, options = case
    cu_seqlens, mask = options.get("cu_seqlens"), options.get("mask")
    x, wanted = exact(values, **options)
    (gradient,) = torch.autograd.grad(wanted, x)
    mask = torch.ones_like(values, dtype=torch.float64) if mask is None else mask.double()
    rows = [values.double().cpu().numpy(), mask.cpu().numpy(), gradient.cpu().numpy()]
    if cu_seqlens is not None:
        starts = cu_seqlens.tolist()
        rows = [[row[a:b] for a, b in itertools.pairwise(starts)] for row in rows]
    number, weights = oracle.aggregate(
        list(rows[0]), list(rows[1]), options["aggregation"], options["denominator"]
    )
    np.testing.assert_allclose(wanted.item(), number, rtol=1e-9, atol=1e-9)
    for own, found in zip(weights, rows[2], strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_weights_are_those_of_verl(backend):
    values = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, torch.nan]], device=DEVICE)
    weights = torch.tensor([[1.0, 0.5, 1.0], [1.0, 0.25, 0.0]], device=DEVICE)
    wanted = {
        "token-mean": 8 / 3.75,
        "sequence-mean-token-mean": (5 / 2.5 + 3 / 1.25) / 2,
        "sequence-mean-token-sum": 8 / 2,
    }
    for aggregation, number in wanted.items():
        result = ops.aggregate(values, aggregation, mask=weights, backend=backend)
        assert result.item() == pytest.approx(number, rel=1e-6)


@pytest.mark.parametrize("weight", [-0.5, torch.nan])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_weight_below_0_is_not_lost(backend, weight):
    weights = torch.tensor([[1.0, weight], [1.0, 1.0]], device=DEVICE)
    for aggregation in AGGREGATIONS[:3]:
        values = torch.ones(2, 2, device=DEVICE)
        assert ops.aggregate(values, aggregation, mask=weights, backend=backend).isnan()


@each_backend
def test_weights_of_a_policy_loss_multiply_its_advantages(backend):
    """What the docstring of `policy_loss` says of per-token weights."""
    logp, old, advantages = torch.randn(3, 4, 50, device=DEVICE, dtype=torch.float64)
    weights = torch.rand(4, 50, device=DEVICE) * (torch.rand(4, 50, device=DEVICE) < 0.7)
    exact = logp.requires_grad_()
    ratio = (exact - old).exp()
    terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    wanted = reference.aggregate(terms, "token-mean", mask=weights)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    mine = logp.detach().float().requires_grad_()
    loss, _ = ops.policy_loss(
        mine,
        old.float(),
        advantages.float() * weights,
        "ppo",
        mask=weights > 0,
        denominator=weights.sum(),
        backend=backend,
    )
    assert_close(loss, wanted, relative=SUM_RELATIVE, absolute=1e-5, what="loss")
    (gradient,) = torch.autograd.grad(loss, mine)
    assert_close(gradient, wanted_gradient, relative=1e-4, absolute=1e-7, what="gradient")


@each_backend
def test_a_nan_that_is_valid_reaches_the_result(backend):
    values = torch.zeros(3, 5, device=DEVICE)
    values[1, 2] = torch.nan
    assert ops.aggregate(values, backend=backend).isnan()


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    values = torch.randn(12 if packed else (3, 4), device=DEVICE)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE) if packed else None
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.warpo.aggregate.default,
        (values.requires_grad_(), values > 0, cu_seqlens, 1, -1.0, None, backend),
        test_utils=utils,
    )
    torch.library.opcheck(
        torch.ops.warpo.aggregate_backward.default,
        (
            values.new_ones(1100),
            None,
            cu_seqlens,
            values.new_ones(()),
            list(values.shape),
            torch.bfloat16,
            backend,
        ),
        test_utils=utils,
    )


X, CU = torch.zeros(2, 3), torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "values, options, message",
    [
        (X[0], {}, r"values must be \(B, T\), or \(N,\) together with cu_seqlens, got \(3,\)"),
        (X, {"cu_seqlens": CU}, r"with cu_seqlens values must be \(N,\), got \(2, 3\)"),
        (X.double(), {}, "values must be float32"),
        (X, {"mask": X.bfloat16()}, r"mask as weights must be float32, got bfloat16: pass mask.fl"),
        (X, {"mask": X.long()}, r"mask must be bool \| uint8, got int64"),
        (X, {"mask": X.clone().requires_grad_()}, r"pass mask.detach\(\)"),
        (X, {"aggregation": "mean"}, "aggregation must be one of token-mean"),
        (X, {"aggregation": AGGREGATIONS[-1]}, "needs denominator = sequences x a constant length"),
        (X, {"denominator": -1.0}, "denominator must be >= 0, got -1.0"),
        (X, {"denominator": X}, r"denominator must be of shape \(\), got \(2, 3\)"),
    ],
)
def test_bad_arguments_are_named(values, options, message):
    with pytest.raises(ValueError, match=message):
        ops.aggregate(values, **options)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def result(values, mask):
        return ops.aggregate(values * 2, mask=mask, backend=backend)

    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    for shape in ((2, 4), (3, 6), (5, 9)):
        values = torch.randn(shape, device=DEVICE, requires_grad=True)
        wanted, found = result(values, values > 0), compiled(values, values > 0)
        assert torch.equal(wanted, found)
        gradients = [torch.autograd.grad(x, values)[0] for x in (wanted, found)]
        assert torch.equal(*gradients)
