import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.tolerance import ROUNDING, SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels.objectives import AGGREGATIONS, OBJECTIVES, Objective

PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "ref_logprobs")


@st.composite
def objectives(draw):
    return Objective(
        ratio_level=draw(st.sampled_from(["token", "sequence"])),
        clip_low=draw(st.sampled_from([0.0, 0.2, 1.0])),
        clip_high=draw(st.sampled_from([0.0, 0.2, 0.28])),
        kl_coef=draw(st.sampled_from([0.0, 0.1, 1.0])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        aggregation=draw(st.sampled_from(AGGREGATIONS)),
        log_ratio_limit=draw(st.sampled_from([20.0, 0.5])),
    )


@st.composite
def cases(draw, backend: str):
    """Tensors of one dtype, padded or packed, with NaN in masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 17, 130]), max_size=5))
    shape = (sum(lengths),) if packed else (len(lengths), draw(st.sampled_from([0, 1, 3, 40, 200])))
    # ratios of e^12 give gradients that float16 does not hold
    spread = draw(st.sampled_from([1e-3, 0.3] if dtype is torch.float16 else [1e-3, 0.3, 3.0]))

    def near(x):
        return x + spread * torch.randn(shape, generator=generator)

    base = -2 * torch.rand(shape, generator=generator)
    tensors = {"logprobs": near(base), "old_logprobs": near(base), "ref_logprobs": near(base)}
    per_sequence = draw(st.booleans()) and len(lengths) != sum(lengths)
    count = (len(lengths),) if per_sequence else shape
    tensors["advantages"] = torch.randn(count, generator=generator)
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        for name in PER_TOKEN:
            if tensors[name].shape == mask.shape:
                tensors[name] = tensors[name].masked_fill(~mask, torch.nan)
        tensors["mask"] = mask
    tensors = {
        name: strided(x.to(dtype) if name in PER_TOKEN else x, layout)
        for name, x in tensors.items()
    }
    if packed:
        starts = list(itertools.accumulate(lengths, initial=0))
        tensors["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return tensors, draw(objectives()), draw(st.sampled_from([1.0, 7.0, 0.0]))


def exact_loss(tensors, objective, denominator):
    """(logprobs, loss, metrics) in float64 from the reference."""
    double = {n: x.detach().double() if n in PER_TOKEN else x for n, x in tensors.items()}
    logp = double["logprobs"].requires_grad_()
    advantages, cu_seqlens = double["advantages"], tensors.get("cu_seqlens")
    if advantages.shape != logp.shape:
        if cu_seqlens is None:
            advantages = advantages[:, None].expand(logp.shape)
        else:
            advantages = advantages.repeat_interleave(cu_seqlens.diff().long())
    loss, metrics = reference.policy_loss(
        logp,
        double["old_logprobs"],
        advantages,
        objective,
        torch.tensor(denominator, dtype=torch.float64, device=DEVICE),
        mask=tensors.get("mask"),
        cu_seqlens=cu_seqlens,
        ref=double["ref_logprobs"],
    )
    return logp, loss, metrics


def away_from_the_bounds(tensors, objective) -> bool:
    """Whether float32 and float64 agree on which side of each bound the ratios lie."""
    if objective.ratio_level == "sequence":
        return False
    log_ratio = tensors["logprobs"].double() - tensors["old_logprobs"].double()
    edges = [1 - objective.clip_low, 1 + objective.clip_high]
    near = sum(((log_ratio.exp() - edge).abs() < 1e-5).sum() for edge in edges)
    return not near


@each_backend
def test_loss_gradient_and_metrics_equal_float64(backend):
    @settings(max_examples=examples(backend, 250))
    @given(cases(backend))
    def check(case):
        tensors, objective, denominator = case
        exact, loss_64, metrics_64 = exact_loss(*case)
        mine = dict(tensors)
        logp = mine.pop("logprobs").detach().requires_grad_()
        loss, metrics = ops.policy_loss(
            logp, mine.pop("old_logprobs"), mine.pop("advantages"), objective,
            denominator=denominator, backend=backend, **mine,
        )  # fmt: skip
        assert loss.dtype == metrics.dtype == torch.float32
        # terms of both signs: an error is relative to the sum of their magnitudes
        tokens = max(1.0, metrics_64[ops.METRICS.index("tokens")].item())
        ratio_max = metrics_64[ops.METRICS.index("ratio_max")].nan_to_num(1, 1, 1).item()
        size = (1 + ratio_max) * 30 * tokens
        assert_close(
            loss, loss_64, what="loss", relative=SUM_RELATIVE, absolute=SUM_RELATIVE * size / 10
        )
        clips = [ops.METRICS.index(name) for name in ("clipped_low", "clipped_high")]
        others = [i for i in range(len(ops.METRICS)) if i not in clips]
        assert_close(
            metrics[others], metrics_64[others], what="metrics",
            relative=SUM_RELATIVE, absolute=SUM_RELATIVE * size / 10,
        )  # fmt: skip
        if not away_from_the_bounds(tensors, objective):
            return
        assert metrics[clips].tolist() == metrics_64[clips].tolist()
        (gradient_64,) = torch.autograd.grad(loss_64 * 0.5, exact)
        (loss * 0.5).backward()
        assert_close(
            logp.grad, gradient_64, what="gradient",
            relative=SUM_RELATIVE, absolute=1e-6 * (1 + ratio_max) + ROUNDING[logp.dtype] * 1e-3,
        )  # fmt: skip

    check()


@each_backend
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sequence_level_gradient(backend, aggregation, kl_estimator):
    """Ratios well away from the bounds, where float32 and float64 cannot disagree on the branch."""
    objective = Objective(
        ratio_level="sequence", aggregation=aggregation, kl_coef=0.1, kl_estimator=kl_estimator
    )
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 70, generator=generator)
    shift = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0, 0.35])[:, None]
    logp = old + shift + 0.01 * torch.randn(6, 70, generator=generator)
    tensors = {
        "logprobs": logp,
        "old_logprobs": old,
        "advantages": torch.randn(6, 70, generator=generator),
        "ref_logprobs": old,
        "mask": torch.rand(6, 70, generator=generator) < 0.7,
    }
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    exact, loss_64, _ = exact_loss(tensors, objective, 6.0)
    loss_64.backward()
    logp = tensors.pop("logprobs").requires_grad_()
    loss, metrics = ops.policy_loss(
        logp, tensors.pop("old_logprobs"), tensors.pop("advantages"), objective,
        denominator=6.0, backend=backend, **tensors,
    )  # fmt: skip
    loss.backward()
    assert metrics[3:5].sum() > 0, "nothing was clipped"
    assert_close(loss, loss_64, relative=SUM_RELATIVE, absolute=1e-5, what="loss")
    assert_close(logp.grad, exact.grad, relative=SUM_RELATIVE, absolute=1e-7, what="gradient")


@each_backend
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_ties_follow_autograd(backend, advantage):
    """At ratio 1 and exactly at both bounds, where torch.min and clamp tie."""
    objective = Objective(clip_low=0.5, clip_high=1.0)
    logp = torch.tensor([[0.5, 1.0, 2.0]], device=DEVICE).log()
    logp = torch.cat([logp, -torch.ones(1, 1, device=DEVICE)], 1).requires_grad_()
    old = torch.tensor([[0.0, 0.0, 0.0, -1.0]], device=DEVICE)
    advantages = torch.full((1, 4), advantage, device=DEVICE)
    loss, _ = ops.policy_loss(logp, old, advantages, objective, denominator=1.0, backend=backend)
    loss.backward()
    twin = logp.detach().clone().requires_grad_()
    ratio = (twin - old).exp()
    (-torch.min(ratio * advantages, ratio.clamp(0.5, 2.0) * advantages).sum()).backward()
    # float32 exp(log 2) may fall on either side of the bound, on the same one for both
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    assert torch.allclose(logp.grad[inside], twin.grad[inside], rtol=1e-5)


@each_backend
@pytest.mark.parametrize("difference", [1e-6, 1e-3, 0.49, 0.51, 5.0, 200.0, -200.0])
def test_k3_of_tiny_and_huge_differences(backend, difference):
    objective = Objective(kl_coef=1.0, kl_estimator="k3")
    logp = torch.full((1, 1), -1.0, device=DEVICE, requires_grad=True)
    ref = logp.detach() + difference
    loss, metrics = ops.policy_loss(
        logp, logp.detach(), torch.zeros(1, 1, device=DEVICE), objective,
        ref_logprobs=ref, denominator=1.0, backend=backend,
    )  # fmt: skip
    loss.backward()
    d = (ref.double() - logp.detach().double()).clamp(-20, 20)
    assert_close(loss, (torch.expm1(d) - d).sum(), relative=3e-6, absolute=0, what="k3")
    slope = -torch.expm1(d) if abs(difference) < 20 else torch.zeros_like(d)
    assert_close(logp.grad, slope, relative=3e-6, absolute=0, what="gradient of k3")


@each_backend
def test_log_ratios_beyond_the_limit_have_no_gradient(backend):
    logp = torch.tensor([[-1.0, -1.0, -1.0]], device=DEVICE, requires_grad=True)
    old = torch.tensor([[-250.0, -1.0, 249.0]], device=DEVICE)
    advantages = torch.tensor([[-1.0, -1.0, 1.0]], device=DEVICE)
    loss, metrics = ops.policy_loss(logp, old, advantages, "ppo", backend=backend)
    loss.backward()
    assert loss.isfinite() and metrics.isfinite().all()
    assert (logp.grad != 0).tolist() == [[False, True, False]]


@each_backend
@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo"])
def test_a_nan_that_is_not_masked_reaches_loss_and_gradient(backend, name):
    """A clamp that dropped it would train on without a word."""
    logp = torch.full((2, 3), -1.0, device=DEVICE)
    logp[0, 1] = torch.nan
    logp.requires_grad_()
    old, advantages = torch.full((2, 3), -1.1, device=DEVICE), torch.ones(2, device=DEVICE)
    loss, _ = ops.policy_loss(
        logp, old, advantages, name, ref_logprobs=old, denominator=1.0, backend=backend
    )
    loss.backward()
    assert loss.isnan() and logp.grad[0, 1].isnan() and logp.grad[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_micro_batches_add_up(backend, name):
    """Loss, gradient and metrics of a batch are the sums of those of its parts."""
    old, shift, advantages = torch.randn(3, 6, 10, device=DEVICE)
    old = -old.abs()
    logp = (old + 0.3 * shift).requires_grad_()
    lengths = torch.tensor([10, 3, 1, 7, 0, 9], device=DEVICE)
    mask = torch.arange(10, device=DEVICE) < lengths[:, None]
    ref = old + 0.1

    def loss_of(rows):
        return ops.policy_loss(
            logp[rows], old[rows], advantages[rows], name, mask=mask[rows],
            ref_logprobs=ref[rows], denominator=30.0, backend=backend,
        )  # fmt: skip

    whole = loss_of(slice(0, 6))
    (gradient,) = torch.autograd.grad(whole.loss, logp)
    total, metrics = 0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = loss_of(rows)
        part.loss.backward()
        total += part.loss.detach()
        metrics.append(part.metrics)
    assert torch.allclose(total, whole.loss, atol=1e-6)
    assert torch.equal(logp.grad, gradient)
    assert torch.allclose(ops.sum_metrics(metrics), whole.metrics, atol=1e-5)


@each_backend
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_packed_equals_padded(backend, name):
    old, shift = torch.randn(2, 4, 9, device=DEVICE)
    logp, old = old + 0.2 * shift, old
    lengths = [9, 2, 0, 5]
    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    mask = mask.to(DEVICE)
    advantages = torch.randn(4, device=DEVICE)
    starts = torch.tensor([0, 9, 11, 11, 16], dtype=torch.int32, device=DEVICE)
    padded_leaf = logp.clone().requires_grad_()
    packed_leaf = logp[mask].clone().requires_grad_()
    padded = ops.policy_loss(
        padded_leaf, old, advantages, name, mask=mask, ref_logprobs=old - 0.1,
        denominator=5.0, backend=backend,
    )  # fmt: skip
    packed = ops.policy_loss(
        packed_leaf, old[mask], advantages, name, cu_seqlens=starts,
        ref_logprobs=(old - 0.1)[mask], denominator=5.0, backend=backend,
    )  # fmt: skip
    padded.loss.backward()
    packed.loss.backward()
    assert torch.allclose(padded.metrics, packed.metrics, rtol=1e-6)
    assert torch.allclose(padded_leaf.grad[mask], packed_leaf.grad, rtol=1e-6, atol=1e-9)


@each_backend
@pytest.mark.parametrize(
    "aggregation, count", [("token-mean", 5.0), ("sequence-mean-token-sum", 3.0)]
)
def test_the_denominator_that_is_not_given_is_counted(backend, aggregation, count):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool, device=DEVICE)
    logp, old, advantages = torch.randn(3, 3, 3, device=DEVICE)
    losses = [
        ops.policy_loss(
            logp, old, advantages, Objective(aggregation=aggregation), mask=mask,
            denominator=denominator, backend=backend,
        ).loss
        for denominator in (None, count, torch.tensor(count, device=DEVICE))
    ]  # fmt: skip
    assert losses[0] == losses[1] == losses[2]


@each_backend
def test_without_valid_tokens_loss_and_gradient_are_zero(backend):
    logp = torch.full((2, 3), torch.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    for name in OBJECTIVES:
        logp.grad = None
        loss, metrics = ops.policy_loss(
            logp, logp.detach(), logp.detach(), name, mask=mask,
            ref_logprobs=logp.detach(), denominator=0.0, backend=backend,
        )  # fmt: skip
        loss.backward()
        assert loss == 0 and (logp.grad == 0).all()
        assert all(value == 0 for value in ops.policy_metrics(metrics).values())


@each_backend
def test_opcheck(backend):
    logp, old, advantages, ref = torch.randn(4, 2, 5, device=DEVICE)
    logp.requires_grad_()
    denominator = torch.tensor(3.0, device=DEVICE)
    numbers = (0.8, 1.2, 3, 0.1, 20.0, denominator, True, backend)
    mask = torch.rand(2, 5, device=DEVICE) < 0.7
    torch.library.opcheck(
        torch.ops.warpo.policy_loss.default,
        (logp, old, advantages, ref, mask, None, False, True, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    starts = torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE)
    flat = [
        x.reshape(1, 10).detach().requires_grad_(x.requires_grad) for x in (logp, old, advantages)
    ]
    torch.library.opcheck(
        torch.ops.warpo.policy_loss.default,
        (*flat, ref.reshape(1, 10), None, starts, True, False, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(logp, old, advantages, mask):
        return ops.policy_loss(
            logp * 1.5, old, advantages, "grpo", mask=mask, ref_logprobs=old,
            denominator=4.0, backend=backend,
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        logp, old, advantages = torch.randn(3, 3, steps, device=DEVICE)
        logp.requires_grad_()
        mask = torch.rand(3, steps, device=DEVICE) < 0.8
        results = []
        for function in (loss, compiled):
            logp.grad = None
            value = function(logp, old, advantages, mask)
            value.backward()
            results.append((value.detach(), logp.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, STARTS = torch.zeros(2, 3), torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, X, X, "grppo"), {}, "objective must be one of ppo, grpo.*got 'grppo'"),
        ((X, X, X, "grpo"), {}, "kl_coef = 0.04 needs ref_logprobs"),
        ((X, X, X, "dr_grpo"), {}, "needs denominator = sequences x a constant length"),
        ((X, X, X, "ppo"), {"denominator": -1.0}, "denominator must be >= 0, got -1.0"),
        ((X, X[:1], X, "ppo"), {}, r"old_logprobs must be of shape \(2, 3\), got \(1, 3\)"),
        ((X, X, X[:, :2], "ppo"), {}, r"one a token, \(2, 3\), or one a sequence, \(2,\)"),
        ((X[0], X[0], X[0], "ppo"), {}, r"or \(N,\) together with cu_seqlens"),
        ((X, X, X, "ppo"), {"cu_seqlens": STARTS}, r"with cu_seqlens logprobs must be \(N,\)"),
        ((X[0], X[0], X[0], "ppo"), {"cu_seqlens": STARTS.long()}, "cu_seqlens must be int32"),
        ((X, X, X, "ppo"), {"mask": X}, r"mask must be bool \| uint8"),
        ((X, torch.zeros(2, 3, requires_grad=True), X, "ppo"), {}, r"pass old_logprobs.detach\(\)"),
        ((X.double(), X, X, "ppo"), {}, "logprobs must be float32"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(*arguments, **options)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("ratio_level", "group", "ratio_level must be one of token, sequence; got 'group'"),
        ("clip_low", 1.5, r"clip_low must be in \[0, 1\], got 1.5"),
        ("clip_high", -0.1, "clip_high must be >= 0"),
        ("kl_coef", -1.0, "kl_coef must be >= 0"),
        ("kl_estimator", "k4", "kl_estimator must be one of k1, k2, k3"),
        ("aggregation", "mean", "aggregation must be one of token-mean"),
        ("log_ratio_limit", 100.0, "exp overflows float32"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{field: value})
