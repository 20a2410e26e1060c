import pytest
import torch
from hypothesis import given, settings

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    each_backend,
    each_backend_slow_triton,
    examples,
)
from tests.kernels.opcheck import opcheck
from tests.kernels.policy_loss_cases import LEVELS, cases, exact_loss, near_a_bound
from tests.tolerance import ROUNDING, SUM_RELATIVE, assert_close
from warpo.kernels import ops
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments
from warpo.kernels._policy_loss import PolicyLossInputs, _operator
from warpo.kernels.objectives import OBJECTIVES, Objective


@each_backend
def test_loss_gradient_and_metrics_equal_float64(backend):
    @settings(max_examples=examples(backend, 400))
    @given(cases(backend))
    def check(case):
        arguments, objective, denominator = case
        if near_a_bound(arguments, objective):
            return
        exact, exact_entropy, loss_64, metrics_64 = exact_loss(*case)
        mine = dict(arguments)
        logp = mine.pop("logprobs").detach().requires_grad_()
        entropy = mine.pop("entropy").detach().requires_grad_()
        loss, metrics = ops.policy_loss(
            logp,
            mine.pop("old_logprobs"),
            mine.pop("advantages"),
            objective,
            entropy=entropy,
            denominator=denominator,
            backend=backend,
            **mine,
        )
        assert loss.dtype == metrics.dtype == torch.float32 and not metrics.requires_grad
        # terms of both signs: an error is relative to the sum of their magnitudes
        tokens = max(1.0, metrics_64[ops.METRICS.index("tokens")].item())
        ratio_max = metrics_64[ops.METRICS.index("ratio_max")].nan_to_num(1, 1, 1).item()
        size = (1 + ratio_max) * 30 * tokens
        bounds = {"relative": SUM_RELATIVE, "absolute": SUM_RELATIVE * size / 10}
        assert_close(loss, loss_64, what="loss", **bounds)
        assert_close(metrics, metrics_64, what="metrics", **bounds)
        for name in ("tokens", "clipped_low", "clipped_high", "clipped_dual", "corrected"):
            row = ops.METRICS.index(name)
            assert metrics[row].item() == metrics_64[row].item(), name
        (loss_64 * 0.5).backward()
        (loss * 0.5).backward()
        assert_close(
            logp.grad,
            exact.grad,
            what="gradient",
            relative=SUM_RELATIVE,
            absolute=1e-6 * (1 + ratio_max) + ROUNDING[logp.dtype] * 1e-3,
        )
        if objective.entropy_coef == 0:
            assert entropy.grad is None
            return
        assert_close(
            entropy.grad,
            exact_entropy.grad,
            what="gradient of the entropy",
            relative=SUM_RELATIVE,
            absolute=ROUNDING[logp.dtype] * 1e-3,
        )

    check()


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
@pytest.mark.parametrize("difference", [1e-6, 1e-3, 0.49, 0.51, 5.0, 200.0, -25.0, -1e9])
def test_k3_of_tiny_and_huge_differences(backend, difference):
    objective = Objective(kl_coef=1.0, kl_estimator="k3")
    logp = torch.full((1, 1), -1.0, device=DEVICE, requires_grad=True)
    ref = logp.detach() + difference
    loss, metrics = ops.policy_loss(
        logp,
        logp.detach(),
        torch.zeros(1, 1, device=DEVICE),
        objective,
        ref_logprobs=ref,
        denominator=1.0,
        backend=backend,
    )
    loss.backward()
    d = (ref.double() - logp.detach().double()).clamp(max=20)
    assert_close(loss, (torch.expm1(d) - d).sum(), relative=3e-6, absolute=0, what="k3")
    slope = -torch.expm1(d) if difference < 20 else torch.zeros_like(d)
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
def test_approx_kl_is_not_clamped_where_the_ratio_is_tiny(backend):
    logp = torch.tensor([[-26.0, -1.0]], device=DEVICE)
    _, metrics = ops.policy_loss(
        logp, torch.full_like(logp, -1.0), torch.ones_like(logp), "ppo", backend=backend
    )
    assert metrics[ops.METRICS.index("approx_kl")].item() == pytest.approx(24.0, rel=1e-6)
    assert metrics[ops.METRICS.index("log_ratio")].item() == -20.0


@each_backend
@pytest.mark.parametrize("ratio_level, surrogate", LEVELS)
@pytest.mark.parametrize("poisoned", ["logprobs", "advantages"])
def test_a_nan_that_is_not_masked_reaches_loss_and_gradient(
    backend, ratio_level, surrogate, poisoned
):
    """A clamp that dropped it would train on without a word."""
    objective = Objective(ratio_level=ratio_level, surrogate=surrogate, kl_coef=0.1)
    tensors = {"logprobs": torch.full((2, 3), -1.0), "advantages": torch.ones(2, 3)}
    tensors[poisoned][0, 1] = torch.nan
    logp = tensors["logprobs"].to(DEVICE).requires_grad_()
    old = torch.full((2, 3), -1.05, device=DEVICE)  # no product of ratios is out of bounds
    loss, _ = ops.policy_loss(
        logp,
        old,
        tensors["advantages"].to(DEVICE),
        objective,
        ref_logprobs=old,
        denominator=1.0,
        backend=backend,
    )
    loss.backward()
    assert loss.isnan() and logp.grad[0, 1].isnan() and logp.grad[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("row", ["grpo_tis", "grpo_mis", "grpo_icepop"])
def test_a_nan_of_the_sampler_is_masked_on_request(backend, row, level):
    objective = OBJECTIVES[row].replace(correction_level=level)
    logp = torch.full((2, 3), -1.0, device=DEVICE, requires_grad=True)
    sampler = torch.full((2, 3), -1.25, device=DEVICE)
    sampler[0, 1] = torch.nan
    tensors = (logp.detach() - 0.1, torch.tensor([1.0, -2.0], device=DEVICE))
    options = {"ref_logprobs": logp.detach() - 0.5, "backend": backend}
    loss, metrics = ops.policy_loss(logp, *tensors, objective, sampler_logprobs=sampler, **options)
    assert loss.isnan()
    loss, metrics = ops.policy_loss(
        logp,
        *tensors,
        objective.replace(correction_nan="mask"),
        sampler_logprobs=sampler,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    # the same without a correction, where the token has no advantage
    known = ~sampler.isnan() if level == "token" else ~sampler.isnan().any(1, keepdim=True)
    weights = torch.where(known, torch.exp(tensors[0] + 1.25), 0.0)
    if level == "sequence":
        weights = torch.where(known, torch.exp(3 * (tensors[0] + 1.25)), 0.0)
    assert (weights < 2).all()
    wanted, plain = ops.policy_loss(
        logp, tensors[0], tensors[1][:, None] * weights, OBJECTIVES["grpo"], **options
    )
    (wanted_gradient,) = torch.autograd.grad(wanted, logp)
    assert torch.allclose(loss, wanted) and torch.allclose(gradient, wanted_gradient)
    assert metrics[ops.METRICS.index("tokens")] == 6
    assert metrics[ops.METRICS.index("corrected")] == (~known).expand(2, 3).sum()
    assert torch.allclose(metrics[ops.METRICS.index("kl")], plain[ops.METRICS.index("kl")])


@each_backend_slow_triton
def test_without_old_logprobs_the_ratio_is_one(backend):
    logp, advantages, sampler = torch.randn(3, 4, 9, device=DEVICE)
    for name in OBJECTIVES:
        results = []
        for old in (None, logp.clone()):
            leaf = logp.clone().requires_grad_()
            loss, metrics = ops.policy_loss(
                leaf,
                old,
                advantages,
                name,
                ref_logprobs=logp - 0.1,
                sampler_logprobs=sampler,
                denominator=3.0,
                backend=backend,
            )
            loss.backward()
            results.append((loss.detach(), metrics, leaf.grad))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert ops.policy_metrics(metrics)["ratio/min"] == 1.0


@each_backend
def test_the_kl_coefficient_may_be_a_tensor(backend):
    """The same bits as the number, and no recompilation or synchronisation when it changes."""
    old, shift, advantages = torch.randn(3, 4, 9, device=DEVICE)
    results = []
    for kl_coef in (0.7, torch.tensor(0.7, device=DEVICE)):
        logp = (old + 0.1 * shift).requires_grad_()
        loss, metrics = ops.policy_loss(
            logp, old, advantages, "ppo_kl", ref_logprobs=old, kl_coef=kl_coef, backend=backend
        )
        loss.backward()
        results.append((loss.detach(), metrics, logp.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert results[0][1][ops.METRICS.index("kl_loss")] > 0


@each_backend
def test_tokens_of_no_sequence_have_no_gradient(backend):
    logp = torch.full((12,), -1.0, device=DEVICE, requires_grad=True)
    entropy = torch.ones(12, device=DEVICE, requires_grad=True)
    starts = torch.tensor([2, 5, 5, 9], dtype=torch.int32, device=DEVICE)
    loss, metrics = ops.policy_loss(
        logp,
        None,
        torch.ones(3, device=DEVICE),
        Objective(entropy_coef=1.0),
        cu_seqlens=starts,
        entropy=entropy,
        backend=backend,
        denominator=1.0,
    )
    loss.backward()
    inside = [False] * 2 + [True] * 7 + [False] * 3
    assert (logp.grad != 0).tolist() == (entropy.grad != 0).tolist() == inside
    assert metrics[ops.METRICS.index("tokens")] == 7


@each_backend_slow_triton
@pytest.mark.parametrize("ratio_level, surrogate", LEVELS)
def test_a_sequence_has_the_same_gradient_alone_and_in_a_batch(backend, ratio_level, surrogate):
    """Bit for bit, and from run to run; one of the sequences is long enough for several threads."""
    objective = Objective(
        ratio_level=ratio_level,
        surrogate=surrogate,
        correction="truncate",
        correction_level="sequence",
        aggregation="sequence-mean-token-mean",
    )
    lengths = (34_000, 3, 900) if backend == "cpu" else (1500, 3, 900)
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    old, shift = torch.randn(2, sum(lengths), device=DEVICE)
    logp, sampler, advantages = old + 0.01 * shift, old + 1e-3 * shift, shift

    def gradient(rows, cu_seqlens):
        leaf = logp[rows].clone().requires_grad_()
        loss, _ = ops.policy_loss(
            leaf,
            old[rows],
            advantages[rows],
            objective,
            cu_seqlens=cu_seqlens,
            sampler_logprobs=sampler[rows],
            denominator=3.0,
            backend=backend,
        )
        loss.backward()
        return leaf.grad

    batch = gradient(slice(None), starts)
    assert torch.equal(batch, gradient(slice(None), starts))
    for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        alone = torch.tensor([0, last - first], dtype=torch.int32, device=DEVICE)
        assert torch.equal(batch[first:last], gradient(slice(first, last), alone))


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of the CPU kernels")
@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo", "off_policy_prefix"])
def test_the_result_does_not_depend_on_the_number_of_threads(name):
    logp, old, advantages = torch.randn(3, 5, 30_000)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        leaf = logp.clone().requires_grad_()
        loss, metrics = ops.policy_loss(
            leaf, old, advantages, name, ref_logprobs=old, backend="cpu", denominator=2.0
        )
        loss.backward()
        results.append((loss.detach(), metrics, leaf.grad))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


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
            logp[rows],
            old[rows],
            advantages[rows],
            name,
            mask=mask[rows],
            ref_logprobs=ref[rows],
            sampler_logprobs=ref[rows],
            denominator=30.0,
            backend=backend,
        )

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
        padded_leaf,
        old,
        advantages,
        name,
        mask=mask,
        ref_logprobs=old - 0.1,
        sampler_logprobs=old + 0.1,
        denominator=5.0,
        backend=backend,
    )
    packed = ops.policy_loss(
        packed_leaf,
        old[mask],
        advantages,
        name,
        cu_seqlens=starts,
        ref_logprobs=(old - 0.1)[mask],
        sampler_logprobs=(old + 0.1)[mask],
        denominator=5.0,
        backend=backend,
    )
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
            logp,
            old,
            advantages,
            Objective(aggregation=aggregation),
            mask=mask,
            denominator=denominator,
            backend=backend,
        ).loss
        for denominator in (None, count, torch.tensor(count, device=DEVICE))
    ]
    assert losses[0] == losses[1] == losses[2]


@each_backend
def test_without_valid_tokens_loss_and_gradient_are_zero(backend):
    logp = torch.full((2, 3), torch.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    for name in OBJECTIVES:
        logp.grad = None
        loss, metrics = ops.policy_loss(
            logp,
            logp.detach(),
            logp.detach(),
            name,
            mask=mask,
            ref_logprobs=logp.detach(),
            sampler_logprobs=logp.detach(),
            denominator=0.0,
            backend=backend,
        )
        loss.backward()
        assert loss == 0 and (logp.grad == 0).all()
        assert all(value == 0 for value in ops.policy_metrics(metrics).values())


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    logp, entropy, old, advantages, ref, sampler = torch.randn(6, 2, 5, device=DEVICE)
    tensors = [logp, entropy, old, advantages, ref, sampler]
    mask, starts = torch.rand(2, 5, device=DEVICE) < 0.7, None
    if packed:
        tensors, mask = [x.flatten() for x in tensors], None
        starts = torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE)
    tensors = [x.clone().requires_grad_(i < 2) for i, x in enumerate(tensors)]
    one = torch.tensor(1.0, device=DEVICE)
    objective = Objective(
        correction="truncate",
        surrogate="dual_clip",
        kl_gradient="k2",
        entropy_coef=0.2,
        aggregation="token-mean" if packed else "sequence-mean-token-mean",
    )
    logp, entropy, old, advantages, ref, sampler = tensors
    inputs = PolicyLossInputs(
        logprobs=logp,
        entropy=entropy,
        old_logprobs=old,
        advantages=advantages,
        ref_logprobs=ref,
        sampler_logprobs=sampler,
        mask=mask,
        cu_seqlens=starts,
        objective=objective.arguments,
        kl_penalty=KlPenaltyArguments(kl=3, kl_coef=0.1, adaptive_kl_coef=one if packed else None),
        denominator=DenominatorArguments(2.0, one if packed else None),
        with_gradient=True,
        with_entropy_gradient=not packed,
        backend=backend,
    )
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(_operator, inputs, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(logp, old, advantages, mask):
        return ops.policy_loss(
            logp * 1.5,
            old,
            advantages,
            "grpo",
            mask=mask,
            ref_logprobs=old,
            denominator=4.0,
            backend=backend,
        ).loss

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
        ((X, X, X, "grppo"), {}, "objective must be one of reinforce, rloo.*got 'grppo'"),
        ((X, X, X, "grpo"), {}, "kl_coef = 0.04 needs ref_logprobs"),
        ((X, X, X, "ppo"), {"kl_coef": X[0, 0]}, "kl_coef = a tensor needs ref_logprobs"),
        ((X, X, X, "ppo"), {"kl_coef": -1.0}, "kl_coef must be >= 0, got -1.0"),
        ((X, X, X, "grpo_tis"), {"ref_logprobs": X}, "'truncate' needs sampler_logprobs"),
        ((X, X, X, Objective(entropy_coef=0.1)), {}, "entropy_coef = 0.1 needs entropy"),
        ((X, X, X, "ppo"), {"entropy": X[:1]}, r"entropy must be of shape \(2, 3\)"),
        ((X, X, X, "dr_grpo"), {}, "needs denominator = sequences x a constant length"),
        ((X, X, X, "ppo"), {"denominator": -1.0}, "denominator must be >= 0, got -1.0"),
        ((X, X[:1], X, "ppo"), {}, r"old_logprobs must be of shape \(2, 3\), got \(1, 3\)"),
        ((X, X, X[:, :2], "ppo"), {}, r"one per token, \(2, 3\), or one per sequence, \(2,\)"),
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
