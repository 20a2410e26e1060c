import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.oracles import reward_model_loss as oracle
from tests.tolerance import ROUNDING, SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference

FLOATS = ("chosen_scores", "rejected_scores", "margins", "scores")


def _finish(draw, generator, tensors, dtype):
    """NaN where masked, the dtype, and a layout."""
    shape = next(iter(tensors.values())).shape
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        bad = draw(st.sampled_from([torch.nan, torch.inf]))
        tensors = {n: x.masked_fill(~mask, bad) if n in FLOATS else x for n, x in tensors.items()}
        tensors["mask"] = mask
    layout = draw(st.sampled_from(["dense", "sliced"]))
    tensors = {n: strided(x.to(dtype) if n in FLOATS else x, layout) for n, x in tensors.items()}
    options = {
        "centering_coef": draw(st.sampled_from([0.0, 0.01])),
        "denominator": draw(st.sampled_from([1.0, 7.0, 0.0])),
    }
    return tensors, options


@st.composite
def pairs(draw, backend: str):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.sampled_from([0, 1, 2, 17, 256, 700]))
    scale = draw(st.sampled_from([0.1, 3.0, 100.0]))
    names = ["chosen_scores", "rejected_scores"] + ["margins"] * draw(st.booleans())
    tensors = {name: scale * torch.randn(count, generator=generator) for name in names}
    return _finish(draw, generator, tensors, draw(st.sampled_from(dtypes(backend))))


@st.composite
def rankings(draw, backend: str):
    """Groups of no, one, few and many completions, with ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 4, 9, 33, 64]), max_size=6))
    count = sum(sizes)
    tensors = {
        "scores": draw(st.sampled_from([0.1, 3.0])) * torch.randn(count, generator=generator),
        "ranks": torch.randint(
            0, draw(st.sampled_from([1, 3, 100])), (count,), generator=generator
        ),
    }
    tensors, options = _finish(draw, generator, tensors, draw(st.sampled_from(dtypes(backend))))
    starts = list(itertools.accumulate(sizes, initial=0))
    tensors["cu_groups"] = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return tensors, options


LOSSES = {
    pairs: (ops.reward_model_loss, reference.reward_model_loss, FLOATS[:2]),
    rankings: (ops.ranking_loss, reference.ranking_loss, FLOATS[3:]),
}


def exact_loss(function, leaves, tensors, options):
    """(leaves, loss, metrics) in float64."""
    exact = {n: x.detach().double() if n in FLOATS else x for n, x in tensors.items()}
    for name in leaves:
        exact[name].requires_grad_()
    loss, metrics = function(
        **exact,
        denominator=torch.tensor(options["denominator"], dtype=torch.float64, device=DEVICE),
        centering_coef=options["centering_coef"],
    )
    return [exact[name] for name in leaves], loss, metrics


@each_backend
@pytest.mark.parametrize("cases", LOSSES, ids=["pairs", "rankings"])
def test_loss_gradients_and_metrics_equal_float64(backend, cases):
    function, definition, leaves = LOSSES[cases]

    @settings(max_examples=examples(backend, 150))
    @given(cases(backend))
    def check(case):
        tensors, options = case
        exact, loss_64, metrics_64 = exact_loss(definition, leaves, *case)
        mine = {n: x.detach().requires_grad_(n in leaves) for n, x in tensors.items()}
        loss, metrics = function(**mine, **options, backend=backend)
        assert loss.dtype == metrics.dtype == torch.float32
        assert_close(loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=1e-6)
        # margins of both signs: an error is relative to the sum of their magnitudes
        size = sum(x.detach().abs().sum().item() for x in exact if x.isfinite().all())
        assert_close(
            metrics,
            metrics_64,
            what="metrics",
            relative=SUM_RELATIVE,
            absolute=2e-5 + 1e-6 * size + SUM_RELATIVE * abs(metrics_64[3].item()),
        )
        (loss * 0.5).backward()
        gradients = torch.autograd.grad(loss_64 * 0.5, exact, allow_unused=True)
        for name, wanted in zip(leaves, gradients, strict=True):
            leaf = mine[name]
            assert_close(
                leaf.grad,
                torch.zeros_like(leaf) if wanted is None else wanted,
                what=name,
                relative=SUM_RELATIVE,
                absolute=1e-6 + ROUNDING[leaf.dtype] * 1e-4,
            )

    check()


@settings(max_examples=40)
@given(pairs("cpu"))
def test_the_reference_of_pairs_is_the_paper(case):
    tensors, options = case
    options["denominator"] = options["denominator"] or 1.0
    leaves, loss, _ = exact_loss(reference.reward_model_loss, FLOATS[:2], *case)
    gradients = torch.autograd.grad(loss, leaves)
    keep = tensors.get("mask", torch.ones_like(leaves[0], dtype=torch.bool))
    margins = tensors.get("margins", torch.zeros_like(leaves[0])).double()
    arrays = [x.detach()[keep].tolist() for x in (*leaves, margins)]
    wanted, *wanted_gradients = oracle.pairs(
        *arrays, options["centering_coef"], options["denominator"]
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    for gradient, theirs in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient[keep].cpu(), theirs, rtol=1e-10, atol=1e-14)
        assert (gradient[~keep] == 0).all()


@settings(max_examples=25)
@given(rankings("cpu"))
def test_the_reference_of_rankings_is_the_paper(case):
    tensors, options = case
    options["denominator"] = options["denominator"] or 1.0
    (scores,), loss, _ = exact_loss(reference.ranking_loss, FLOATS[3:], *case)
    (gradient,) = torch.autograd.grad(loss, scores)
    keep = tensors.get("mask", torch.ones_like(scores, dtype=torch.bool))
    groups, ranks, kept_gradients = (
        [x[a:b][keep[a:b]].tolist() for a, b in itertools.pairwise(tensors["cu_groups"].tolist())]
        for x in (scores.detach(), tensors["ranks"], gradient)
    )
    wanted, gradients = oracle.rankings(
        groups, ranks, options["centering_coef"], options["denominator"]
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    for mine, theirs in zip(kept_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_the_backend_reference_is_the_reference():
    chosen, rejected = torch.randn(2, 9, device=DEVICE, dtype=torch.bfloat16)
    ranks = torch.arange(9).to(DEVICE)
    starts = torch.tensor([0, 3, 9], dtype=torch.int32, device=DEVICE)
    runs = [
        (
            ops.reward_model_loss(chosen, rejected, margins=rejected, backend=backend),
            ops.ranking_loss(chosen, ranks, starts, mask=rejected > 0, backend=backend),
        )
        for backend in ("reference", BACKENDS[0])
    ]
    for one, two in zip(*runs, strict=True):
        assert one.metrics.dtype == torch.float32
        assert torch.allclose(one.metrics, two.metrics, rtol=1e-5, atol=1e-5)


@each_backend
def test_a_pair_is_a_ranking_of_two(backend):
    chosen, rejected = torch.randn(2, 8, device=DEVICE)
    scores = torch.stack([rejected, chosen], 1).flatten()
    ranks = torch.tensor([2, 1], device=DEVICE).repeat(8)
    starts = torch.arange(0, 17, 2, dtype=torch.int32, device=DEVICE)
    one = ops.reward_model_loss(chosen, rejected, centering_coef=0.1, backend=backend)
    two = ops.ranking_loss(scores, ranks, starts, centering_coef=0.1, backend=backend)
    assert torch.allclose(one.metrics, two.metrics, rtol=1e-5, atol=1e-6)


@each_backend
def test_far_scores_have_exact_losses_and_finite_gradients(backend):
    chosen = torch.tensor([200.0, -200.0, 20.0, 0.0], device=DEVICE, requires_grad=True)
    loss, _ = ops.reward_model_loss(
        chosen, torch.zeros(4, device=DEVICE), denominator=1.0, backend=backend
    )
    loss.backward()
    wanted = 200 + 2.0611536e-9 + 0.6931472
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    slopes = [0.0, -1.0, -2.0611536e-9, -0.5]
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=2e-5, abs=1e-30)


@each_backend
def test_micro_batches_add_up(backend):
    chosen, rejected = 10 + torch.randn(2, 600, device=DEVICE)
    chosen.requires_grad_()

    def loss_of(rows):
        return ops.reward_model_loss(
            chosen[rows], rejected[rows], denominator=600.0, backend=backend
        )

    whole = loss_of(slice(0, 600))
    (gradient,) = torch.autograd.grad(whole.loss, chosen)
    parts = [loss_of(rows) for rows in (slice(0, 1), slice(1, 400), slice(400, 600))]
    sum(part.loss for part in parts).backward()
    assert torch.equal(chosen.grad, gradient)
    merged = ops.merge_reward_model_metrics([part.metrics for part in parts])
    assert torch.allclose(merged, whole.metrics, rtol=1e-5, atol=1e-5)
    read = ops.reward_model_metrics(merged)
    scores = torch.cat([chosen, rejected]).detach()
    assert read["score/mean"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert read["score/std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-5)
    correct = (chosen > rejected).float().mean().item()
    assert read["reward_model/accuracy"] == pytest.approx(correct)


@each_backend
def test_runs_are_equal_bit_for_bit(backend):
    chosen, rejected = torch.randn(2, 900, device=DEVICE)
    runs = [ops.reward_model_loss(chosen, rejected, backend=backend) for _ in range(3)]
    assert all(torch.equal(run.metrics, runs[0].metrics) for run in runs)


@each_backend
def test_without_pairs_loss_and_gradient_are_zero(backend):
    scores = torch.full((4,), torch.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    starts = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    for loss, metrics in (
        ops.reward_model_loss(scores, scores.detach(), mask=mask, backend=backend),
        ops.ranking_loss(scores, torch.arange(4).to(DEVICE), starts, mask=mask, backend=backend),
    ):
        scores.grad = None
        loss.backward()
        assert loss == 0 and (scores.grad == 0).all()
        assert all(value == 0 for value in ops.reward_model_metrics(metrics).values())


@each_backend
def test_a_nan_that_is_not_masked_reaches_loss_and_gradient(backend):
    scores = torch.tensor([1.0, torch.nan, 2.0, 3.0], device=DEVICE, requires_grad=True)
    starts = torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    ranks = torch.arange(4).to(DEVICE)
    loss, _ = ops.ranking_loss(scores, ranks, starts, backend=backend)
    loss.backward()
    assert loss.isnan() and scores.grad.isnan().tolist() == [True, True, False, False]
    scores.grad = None
    loss, _ = ops.reward_model_loss(scores, torch.zeros_like(scores), backend=backend)
    loss.backward()
    assert loss.isnan() and scores.grad.isnan().tolist() == [False, True, False, False]


@each_backend
def test_opcheck(backend):
    chosen, rejected = (torch.randn(5, device=DEVICE, requires_grad=True) for _ in range(2))
    mask = torch.rand(5, device=DEVICE) < 0.7
    one = torch.tensor(3.0, device=DEVICE)
    ranks, starts = torch.arange(5).to(DEVICE), torch.tensor([0, 5], dtype=torch.int32).to(DEVICE)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.warpo.reward_model_loss.default,
        (chosen, rejected, chosen.detach().clone(), mask, 0.1, 0.0, one, True, backend),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.warpo.ranking_loss.default,
        (chosen, ranks, mask, starts, 0.1, 0.0, one, True, backend),
        test_utils=checks,
    )


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(scores, ranks, starts):
        ranked = ops.ranking_loss(scores * 2, ranks, starts, backend=backend).loss
        return ranked + ops.reward_model_loss(scores, scores.flip(0), backend=backend).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    starts = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
    for count in (4, 6, 9):
        scores = torch.randn(count, device=DEVICE, requires_grad=True)
        ranks = torch.arange(count).to(DEVICE)
        results = []
        for function in (loss, compiled):
            scores.grad = None
            value = function(scores, ranks, starts)
            value.backward()
            results.append((value.detach(), scores.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


S, R = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
STARTS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((S[None], S[None]), {}, r"chosen_scores must be \(B,\), got \(1, 4\)"),
        ((S, S[:3]), {}, r"rejected_scores must be of shape \(4,\), got \(3,\)"),
        ((S, S), {"margins": S[:1]}, r"margins must be of shape \(4,\)"),
        ((S, S), {"margins": S.clone().requires_grad_()}, r"pass margins.detach\(\)"),
        ((S, S), {"mask": S}, r"mask must be bool \| uint8"),
        ((S, S), {"centering_coef": -1.0}, "centering_coef must be >= 0, got -1.0"),
        ((S, S), {"denominator": -1.0}, "denominator must be >= 0, got -1.0"),
        ((S.long(), S), {}, "chosen_scores must be float32"),
    ],
)
def test_bad_arguments_of_pairs_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.reward_model_loss(*arguments, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((S[None], R, STARTS), r"scores must be \(N,\), got \(1, 4\)"),
        ((S, R[:3], STARTS), r"ranks must be of shape \(4,\)"),
        ((S, R.short(), STARTS), r"ranks must be int64 \| int32, got int16"),
        ((S, R, STARTS.long()), "cu_groups must be int32"),
        ((S, R, STARTS[:0]), r"cu_groups must be a dense \(G \+ 1,\)"),
    ],
)
def test_bad_arguments_of_rankings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.ranking_loss(*arguments)
