import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples
from tests.kernels.opcheck import opcheck
from tests.kernels.preference_cases import completions, lists_of, magnitude
from tests.oracles import preference_loss as oracle
from tests.tolerance import ROUNDING, SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._kto_loss import KtoLossInputs
from warpo.kernels._kto_loss import _operator as kto_operator
from warpo.kernels._preference_loss import CompletionsInputs, PreferenceLossInputs, _operator
from warpo.kernels.preferences import PREFERENCES, Preference


@st.composite
def cases(draw, backend: str):
    """(chosen, rejected, loss, denominator)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    number = draw(st.sampled_from([0, 1, 2, 5]))
    sides = [draw(completions(generator, number, dtype)) for _ in range(2)]
    row = PREFERENCES[draw(st.sampled_from(list(PREFERENCES)))]
    changes = {"beta": draw(st.sampled_from([0.05, 1.0]))}
    if not row.odds:
        changes["length_normalise"] = draw(st.booleans())
    if row.link == "logistic":
        changes["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))
        changes["robust"] = draw(st.booleans())
    return *sides, row.replace(**changes), draw(st.sampled_from([1.0, 7.0, 0.0]))


def arguments(chosen, rejected, leaf=lambda x: x, constant=lambda x: x):
    """Positional and keyword arguments of either definition."""
    tensors = [leaf(side["logprobs"]) for side in (chosen, rejected)]
    tensors += [constant(side["ref_logprobs"]) for side in (chosen, rejected)]
    names = (("chosen", chosen), ("rejected", rejected))
    options = {f"{n}_{k}": side[k] for n, side in names for k in ("mask", "cu_seqlens")}
    return tensors, options


def exact_loss(chosen, rejected, row, denominator):
    """([chosen, rejected], loss, metrics) in float64."""
    tensors, options = arguments(
        chosen, rejected, lambda x: x.detach().double().requires_grad_(), lambda x: x.double()
    )
    row = {name: getattr(row, name) for name in row.__slots__}
    scale = torch.tensor(denominator, dtype=torch.float64, device=DEVICE)
    return tensors[:2], *reference.preference_loss(*tensors, scale, **options, **row)


@each_backend
def test_loss_gradients_and_metrics_equal_float64(backend):
    @settings(max_examples=examples(backend, 120))
    @given(cases(backend))
    def check(case):
        chosen, rejected, row, denominator = case
        exact, loss_64, metrics_64 = exact_loss(*case)
        tensors, options = arguments(chosen, rejected, lambda x: x.detach().requires_grad_())
        loss, metrics = ops.preference_loss(
            *tensors, loss=row, denominator=denominator, backend=backend, **options
        )
        assert loss.dtype == metrics.dtype == torch.float32
        # a sum over a completion is good to a few ulp of its magnitude, and so is its slope
        rounding = 3e-7 * (1 + magnitude(chosen, rejected))
        square = 1 + 2 * loss_64.abs().sqrt().item() if row.link == "square" else 1
        assert_close(
            loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=5 * rounding * square
        )
        assert_close(
            metrics[1:],
            metrics_64[1:],
            what="metrics",
            relative=SUM_RELATIVE,
            absolute=5 * rounding,
        )
        (loss * 0.5).backward()
        gradients = torch.autograd.grad(loss_64 * 0.5, exact)
        for name, mine, wanted in zip(("chosen", "rejected"), tensors, gradients, strict=False):
            assert_close(
                mine.grad,
                wanted,
                what=name,
                relative=SUM_RELATIVE + rounding,
                absolute=2 * rounding * row.beta + 1e-6 + ROUNDING[mine.dtype] * 1e-4,
            )

    check()


@pytest.mark.parametrize("name", list(PREFERENCES))
def test_the_reference_is_the_paper(name):
    row = PREFERENCES[name]
    options = {"beta": row.beta}
    for option in ("label_smoothing", "margin", "nll_coef"):
        if getattr(row, option):
            options[option] = getattr(row, option)

    @settings(max_examples=15)
    @given(cases("cpu"))
    def check(case):
        chosen, rejected, *_ = case
        _, loss, metrics = exact_loss(chosen, rejected, row, 3.0)
        pairs = zip(lists_of(chosen), lists_of(rejected), strict=True)
        pairs = [(c, r) for c, r in pairs if len(c[0]) and len(r[0])]
        wanted = sum(getattr(oracle, name)(c, r, **options) for c, r in pairs)
        assert loss.item() == pytest.approx(wanted / 3, rel=1e-9, abs=1e-12)
        assert metrics[1] == len(pairs)

    check()


def test_the_backend_reference_is_the_reference():
    chosen, rejected, ref = -torch.rand(3, 4, 9, device=DEVICE, dtype=torch.bfloat16)
    desirable = torch.tensor([True, False, True, True], device=DEVICE)
    runs = [
        [ops.kto_loss(chosen, ref, desirable, kl=0.5, backend=backend).metrics]
        + [
            ops.preference_loss(chosen, rejected, ref, ref, loss=name, backend=backend).metrics
            for name in PREFERENCES
        ]
        for backend in ("reference", BACKENDS[0])
    ]
    for one, two in zip(*runs, strict=True):
        assert one.dtype == torch.float32 and torch.allclose(one, two, rtol=1e-5, atol=1e-5)


@each_backend
def test_odds_near_probability_one_are_finite(backend):
    """Every token certain, to float32: infinite odds, of which 0 * inf would make a NaN."""
    certain, likely = torch.zeros(1, 3), torch.full((1, 3), -1e-6)
    for chosen, rejected in ((certain, likely), (likely, certain), (certain, certain)):
        leaves = [x.to(DEVICE).requires_grad_() for x in (chosen.clone(), rejected.clone())]
        loss, metrics = ops.preference_loss(*leaves, loss="orpo", backend=backend)
        loss.backward()
        assert loss.isfinite() and metrics.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@each_backend
def test_far_differences_have_exact_losses_and_finite_gradients(backend):
    chosen = torch.tensor([[300.0], [-300.0], [20.0], [0.0]], device=DEVICE, requires_grad=True)
    zeros = torch.zeros(4, 1, device=DEVICE)
    loss, _ = ops.preference_loss(
        chosen, zeros, zeros, zeros, loss=Preference(beta=1.0), denominator=1.0, backend=backend
    )
    loss.backward()
    assert loss.item() == pytest.approx(300 + 2.0611536e-9 + 0.6931472, rel=1e-6)
    slopes = [0.0, -1.0, -2.0611536e-9, -0.5]
    assert chosen.grad.flatten().tolist() == pytest.approx(slopes, rel=2e-5, abs=1e-30)


@each_backend
@pytest.mark.parametrize("name", list(PREFERENCES))
def test_micro_batches_add_up(backend, name):
    """Gradients bit for bit: a pair does not know how many there are."""
    chosen, rejected, ref = -torch.rand(3, 6, 10, device=DEVICE)
    chosen.requires_grad_()
    mask = torch.rand(6, 10, device=DEVICE) < 0.7
    mask[4] = False

    def loss_of(rows):
        return ops.preference_loss(
            chosen[rows],
            rejected[rows],
            ref[rows],
            ref[rows],
            loss=name,
            chosen_mask=mask[rows],
            denominator=30.0,
            backend=backend,
        )

    whole = loss_of(slice(0, 6))
    (gradient,) = torch.autograd.grad(whole.loss, chosen)
    parts = [loss_of(rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    sum(part.loss for part in parts).backward()
    assert torch.equal(chosen.grad, gradient) and (gradient[~mask] == 0).all()
    assert torch.allclose(sum(part.metrics for part in parts), whole.metrics, atol=1e-5)
    assert whole.metrics[1] == 5


@each_backend
def test_one_forward_pass_over_both_sides(backend):
    """Rows of one padded tensor, or all of a packed one with two parts of cu_seqlens."""
    logprobs, ref = -torch.rand(2, 4, 5, device=DEVICE)
    lengths = torch.tensor([5, 1, 3, 4])
    mask = (torch.arange(5)[None] < lengths[:, None]).to(DEVICE)
    starts = torch.tensor([0, 5, 6, 9, 13], dtype=torch.int32, device=DEVICE)
    padded, packed = logprobs.clone().requires_grad_(), logprobs[mask].requires_grad_()
    ops.preference_loss(
        padded[:2],
        padded[2:],
        ref[:2],
        ref[2:],
        chosen_mask=mask[:2],
        rejected_mask=mask[2:],
        backend=backend,
    ).loss.backward()
    ops.preference_loss(
        packed,
        packed,
        ref[mask],
        ref[mask],
        chosen_cu_seqlens=starts[:3],
        rejected_cu_seqlens=starts[2:],
        backend=backend,
    ).loss.backward()
    assert (packed.grad != 0).all() and torch.equal(padded.grad[mask], packed.grad)


@each_backend
@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "orpo"])
def test_a_nan_that_is_not_masked_reaches_loss_and_gradient(backend, name):
    chosen, rejected, ref = -torch.rand(3, 2, 3, device=DEVICE)
    chosen[0, 1] = torch.nan
    leaves = [x.requires_grad_() for x in (chosen, rejected)]
    loss, _ = ops.preference_loss(*leaves, ref, ref, loss=name, backend=backend)
    loss.backward()
    assert loss.isnan()
    assert all(leaf.grad[0].isnan().all() and leaf.grad[1].isfinite().all() for leaf in leaves)


@each_backend
def test_without_pairs_loss_and_gradient_are_zero(backend):
    logprobs = torch.full((2, 3), torch.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    other = torch.zeros(2, 3, device=DEVICE)
    for name in PREFERENCES:
        logprobs.grad = None
        loss, metrics = ops.preference_loss(
            logprobs, other, other, other, loss=name, chosen_mask=mask, backend=backend
        )
        loss.backward()
        assert loss == 0 and (logprobs.grad == 0).all()
        assert all(value == 0 for value in ops.preference_metrics(metrics).values())


def long_sides():
    """Packed and as padded rows with a mask: CUDA C++ sums a completion in slices of 256 tokens of
    every 8192, Triton of 1024 of every 32768, whose ends those of the completions are beside;
    several blocks write a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    for lengths in ([0, 256, 257, 8192, 8193], [1, 1025, 0, 32769, 512]):
        steps = max(lengths) + 1
        mask = torch.arange(steps)[None] < torch.tensor(lengths)[:, None]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        logprobs, ref = -torch.rand(2, 5, steps, generator=generator) / 100
        logprobs, ref = (x.masked_fill(~mask, torch.nan).to(DEVICE) for x in (logprobs, ref))
        mask = mask.to(DEVICE)
        padded = {"logprobs": logprobs, "ref_logprobs": ref, "mask": mask, "cu_seqlens": None}
        packed = {"logprobs": logprobs[mask], "ref_logprobs": ref[mask], "mask": None}
        yield padded, packed | {"cu_seqlens": starts.to(DEVICE)}


@each_backend
def test_long_completions_equal_float64(backend):
    row = PREFERENCES["dpo"]
    chosen, rejected = long_sides()
    for sides in zip(chosen, rejected, strict=True):
        exact, loss_64, metrics_64 = exact_loss(*sides, row, 5.0)
        tensors, options = arguments(*sides, lambda x: x.clone().requires_grad_())
        options |= {"loss": row, "denominator": 5.0, "backend": backend}
        loss, metrics = ops.preference_loss(*tensors, **options)
        loss.backward()
        assert_close(loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=1e-5)
        assert_close(metrics, metrics_64, what="metrics", relative=SUM_RELATIVE, absolute=1e-4)
        for mine, wanted in zip(tensors, torch.autograd.grad(loss_64, exact), strict=False):
            assert_close(mine.grad, wanted, what="gradient", relative=2e-5, absolute=1e-9)
        if sides[0]["cu_seqlens"] is not None:
            continue
        for i in range(5):  # a pair does not know how many there are
            alone = [{k: x if x is None else x[i : i + 1] for k, x in s.items()} for s in sides]
            own, masks = arguments(*alone, lambda x: x.clone().requires_grad_())
            ops.preference_loss(*own, **options | masks).loss.backward()
            assert all(
                torch.equal(a.grad[0], b.grad[i]) for a, b in zip(own[:2], tensors, strict=False)
            )


@each_backend
def test_long_completions_with_a_verdict_equal_float64(backend):
    desirable = torch.tensor([True, False, True, True, False], device=DEVICE)
    options = {"kl": 0.5, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.33}
    for side in itertools.chain(*long_sides()):
        exact, loss_64, metrics_64 = exact_kto_loss(side, desirable, options, 5.0)
        leaf = side["logprobs"].clone().requires_grad_()
        rest = {"mask": side["mask"], "cu_seqlens": side["cu_seqlens"], "denominator": 5.0}
        loss, metrics = ops.kto_loss(
            leaf, side["ref_logprobs"], desirable, **options, **rest, backend=backend
        )
        loss.backward()
        (wanted,) = torch.autograd.grad(loss_64, exact)
        assert_close(loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=1e-5)
        assert_close(metrics, metrics_64, what="metrics", relative=SUM_RELATIVE, absolute=1e-4)
        assert_close(leaf.grad, wanted, what="gradient", relative=2e-5, absolute=1e-9)


@each_backend
def test_runs_are_equal_bit_for_bit(backend):
    chosen, rejected, ref = -torch.rand(3, 20, 600, device=DEVICE)
    runs = [ops.preference_loss(chosen, rejected, ref, ref, backend=backend) for _ in range(3)]
    assert all(torch.equal(run.metrics, runs[0].metrics) for run in runs)


@st.composite
def kto_cases(draw, backend: str):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    number = draw(st.sampled_from([0, 1, 2, 5]))
    side = draw(completions(generator, number, draw(st.sampled_from(dtypes(backend)))))
    options = {
        "kl": draw(st.sampled_from([0.0, 2.5])),
        "beta": draw(st.sampled_from([0.05, 1.0])),
        "desirable_weight": draw(st.sampled_from([1.0, 1.33])),
        "undesirable_weight": draw(st.sampled_from([1.0, 0.0])),
    }
    desirable = (torch.rand(number, generator=generator) < 0.5).to(DEVICE)
    return side, desirable, options, draw(st.sampled_from([1.0, 7.0, 0.0]))


def exact_kto_loss(side, desirable, options, denominator):
    exact = side["logprobs"].detach().double().requires_grad_()
    options = options.copy()
    kl, scale = (
        torch.tensor(x, dtype=torch.float64, device=DEVICE)
        for x in (options.pop("kl"), denominator)
    )
    loss, metrics = reference.kto_loss(
        exact,
        side["ref_logprobs"].double(),
        desirable,
        kl,
        scale,
        mask=side["mask"],
        cu_seqlens=side["cu_seqlens"],
        **options,
    )
    return exact, loss, metrics


@each_backend
def test_kto_loss_gradient_and_metrics_equal_float64(backend):
    @settings(max_examples=examples(backend, 100))
    @given(kto_cases(backend))
    def check(case):
        side, desirable, options, denominator = case
        exact, loss_64, metrics_64 = exact_kto_loss(*case)
        leaf = side["logprobs"].detach().requires_grad_()
        loss, metrics = ops.kto_loss(
            leaf,
            side["ref_logprobs"],
            desirable,
            mask=side["mask"],
            cu_seqlens=side["cu_seqlens"],
            denominator=denominator,
            backend=backend,
            **options,
        )
        rounding = 3e-7 * (1 + magnitude(side))
        assert_close(loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=5 * rounding)
        assert_close(
            metrics, metrics_64, what="metrics", relative=SUM_RELATIVE, absolute=5 * rounding
        )
        (loss * 0.5).backward()
        (wanted,) = torch.autograd.grad(loss_64 * 0.5, exact)
        assert_close(
            leaf.grad,
            wanted,
            what="gradient",
            relative=SUM_RELATIVE,
            absolute=2 * rounding * options["beta"] + 1e-7 + ROUNDING[leaf.dtype] * 1e-4,
        )

    check()


@settings(max_examples=40)
@given(kto_cases("cpu"))
def test_the_reference_of_kto_is_the_paper(case):
    side, desirable, options, _ = case
    _, loss, metrics = exact_kto_loss(side, desirable, options, 3.0)
    kept = list(zip(lists_of(side), desirable.tolist(), strict=True))
    wanted = sum(oracle.kto(a, good, **options) for a, good in kept if len(a[0]))
    assert loss.item() == pytest.approx(wanted / 3, rel=1e-9, abs=1e-12)
    point = ops.kto_reference_point(
        side["logprobs"], side["ref_logprobs"], mask=side["mask"], cu_seqlens=side["cu_seqlens"]
    )
    expected = oracle.kto_reference_point([a for a, _ in kept]) if kept else 0.0
    assert point.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@each_backend
def test_kto_of_nothing_and_of_a_nan(backend):
    logprobs = torch.full((2, 3), -1.0, device=DEVICE)
    logprobs[0] = torch.nan
    logprobs.requires_grad_()
    ref, desirable = torch.zeros(2, 3, device=DEVICE), torch.tensor([True, False], device=DEVICE)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    loss, metrics = ops.kto_loss(logprobs, ref, desirable, kl=0.0, mask=mask, backend=backend)
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()
    assert all(value == 0 for value in ops.kto_metrics(metrics).values())
    logprobs.grad = None
    loss, _ = ops.kto_loss(logprobs, ref, desirable, kl=0.0, backend=backend)
    loss.backward()
    assert loss.isnan() and logprobs.grad[0].isnan().all() and logprobs.grad[1].isfinite().all()


@each_backend
def test_opcheck(backend):
    chosen, rejected = (-torch.rand(2, n, device=DEVICE) for n in (5, 3))
    refs = [x.clone() for x in (chosen, rejected)]
    masks = [torch.rand(x.shape, device=DEVICE) < 0.7 for x in refs]
    leaves = [x.requires_grad_() for x in (chosen, rejected)]
    one, checks = torch.tensor(3.0, device=DEVICE), ("test_schema", "test_faketensor")
    checks += ("test_aot_dispatch_dynamic",)
    completions = [CompletionsInputs(x, mask, None) for x, mask in zip(refs, masks, strict=True)]
    inputs = PreferenceLossInputs(
        chosen_logprobs=leaves[0],
        rejected_logprobs=leaves[1],
        chosen=completions[0],
        rejected=completions[1],
        link=0,
        length_normalise=True,
        odds=False,
        beta=0.1,
        margin=0.0,
        positive_weight=0.9,
        negative_weight=0.1,
        nll_coef=1.0,
        denominator=DenominatorArguments(0.0, one),
        with_gradient=True,
        backend=backend,
    )
    opcheck(_operator, inputs, test_utils=checks)
    kto = KtoLossInputs(
        logprobs=chosen,
        completions=completions[0],
        desirable=torch.tensor([True, False], device=DEVICE),
        kl=one.clone(),
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        denominator=DenominatorArguments(0.0, one),
        with_gradient=True,
        backend=backend,
    )
    opcheck(kto_operator, kto, test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(chosen, rejected, desirable):
        refs = chosen.detach() - 1, rejected.detach() + 1
        point = ops.kto_reference_point(chosen, refs[0])
        kto = ops.kto_loss(chosen * 2, refs[0], desirable, kl=point, backend=backend).loss
        return kto + ops.preference_loss(chosen * 2, rejected, *refs, backend=backend).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        chosen, rejected = -torch.rand(2, 3, steps, device=DEVICE)
        chosen.requires_grad_()
        desirable = torch.tensor([True, False, True], device=DEVICE)
        results = []
        for function in (loss, compiled):
            chosen.grad = None
            value = function(chosen, rejected, desirable)
            value.backward()
            results.append((value.detach(), chosen.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, STARTS = torch.zeros(2, 3), torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, X), {}, "this loss needs ref_chosen_logprobs; or a row with reference=False"),
        ((X, X, X), {}, "this loss needs ref_rejected_logprobs"),
        ((X, X, X, X), {"loss": "dppo"}, "loss must be one of dpo, .*got 'dppo'"),
        ((X, X[:1], X, X[:1]), {}, "chosen_logprobs has 2 completions, rejected_logprobs 1"),
        ((X, X, X[:, :2], X), {}, r"ref_chosen_logprobs must be of shape \(2, 3\)"),
        ((X, X, X, X.clone().requires_grad_()), {}, r"pass ref_rejected_logprobs.detach\(\)"),
        ((X, X, X, X), {"chosen_mask": X}, r"chosen_mask must be bool \| uint8"),
        ((X[0], X, X[0], X), {}, r"or \(N,\) together with chosen_cu_seqlens"),
        ((X, X, X, X), {"rejected_cu_seqlens": STARTS}, r"with rejected_cu_seqlens rejected_logp"),
        ((X, X, X, X), {"denominator": -1.0}, "denominator must be >= 0, got -1.0"),
        ((X, X.double(), X, X), {}, "rejected_logprobs must be float32"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.preference_loss(*arguments, **options)


GOOD = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, X, GOOD[:1]), {}, r"desirable must be of shape \(2,\), got \(1,\)"),
        ((X, X, torch.ones(2)), {}, r"desirable must be bool \| uint8"),
        ((X, X[:1], GOOD), {}, r"ref_logprobs must be of shape \(2, 3\)"),
        ((X, X, GOOD), {"beta": -1.0}, "beta must be >= 0, got -1.0"),
        ((X, X, GOOD), {"desirable_weight": -1.0}, "desirable_weight must be >= 0"),
        ((X, X, GOOD), {"kl": torch.zeros(2)}, r"kl must be of shape \(\), got \(2,\)"),
        ((X, X, GOOD), {"kl": torch.zeros((), requires_grad=True)}, r"pass kl.detach\(\)"),
    ],
)
def test_bad_arguments_of_kto_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.kto_loss(*arguments, **{"kl": 0.0, **options})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"link": "exp"}, "link must be one of logistic, hinge, square; got 'exp'"),
        ({"beta": 0.0}, "beta must be > 0, got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"nll_coef": -1.0}, "nll_coef must be >= 0"),
        ({"link": "hinge", "label_smoothing": 0.1}, "go with link 'logistic', got 'hinge'"),
        ({"link": "square", "margin": 1.0}, "set margin to 0, got 1.0"),
        ({"odds": True}, "odds needs reference=False and length_normalise=True"),
    ],
)
def test_a_preference_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preference(**fields)
