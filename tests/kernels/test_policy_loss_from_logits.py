"""Against `reference.logprobs` and `reference.policy_loss` in float64, gradients included."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    apart,
    dtypes,
    each_backend,
    examples,
    last_arguments,
    roundings,
    strided,
)
from tests.kernels.opcheck import opcheck
from tests.kernels.policy_loss_cases import exact_loss, near_a_bound, objectives
from tests.tolerance import (
    GRADIENT_ABSOLUTE,
    GRADIENT_RELATIVE,
    LOGPROB_ABSOLUTE,
    LOGPROB_RELATIVE,
    SUM_RELATIVE,
    assert_close,
)
from warpo.kernels import _policy_loss_from_logits as operator_module
from warpo.kernels import dispatch, ops, reference
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments
from warpo.kernels._policy_loss_from_logits import PolicyLossFromLogitsInputs, _operator
from warpo.kernels.objectives import OBJECTIVES, Objective


@st.composite
def cases(draw, backend: str):
    """Logits and per-token arguments, padded or packed, with NaN in masked slots."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.sampled_from([0, 1, 3, 5]), min_size=1, max_size=3))
    shape = (sum(lengths),) if packed else (len(lengths), draw(st.sampled_from([0, 1, 4])))
    vocab = draw(st.sampled_from([1, 2, 7, 31, 257, 1000, 4099]))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    offset = draw(st.sampled_from([0.0, 1e4 if scale > 1 else 0.0]))
    dtype = draw(st.sampled_from(dtypes(backend)))
    logits = (scale * torch.randn((*shape, vocab), generator=generator) + offset).to(dtype)
    targets = torch.randint(0, vocab, shape, generator=generator)
    if draw(st.booleans()) and vocab > 2:
        closed = torch.rand(logits.shape, generator=generator) < 0.3
        closed.scatter_(-1, targets[..., None], False)
        logits = logits.masked_fill(closed, -torch.inf)
    temperature = draw(st.sampled_from([1.0, 0.7, 3.0]))
    if draw(st.booleans()):
        temperature = 0.3 + torch.rand(shape, generator=generator)
    logp, _ = reference.logprobs(logits.double(), targets, temperature)
    spread = draw(st.sampled_from([1e-3, 0.3]))

    def near():
        return (logp + spread * torch.randn(shape, generator=generator)).float()

    tokens = {f"{name}_logprobs": near() for name in ("old", "ref", "sampler")}
    if draw(st.booleans()):
        tokens["old_logprobs"] = None
    per_sequence = draw(st.booleans()) and len(lengths) != sum(lengths)
    count = (len(lengths),) if per_sequence else shape
    tokens["advantages"] = torch.randn(count, generator=generator)
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < 0.6
        logits = logits.masked_fill(~mask[..., None], torch.nan)
        for name, x in tokens.items():
            if x is not None and x.shape == shape:
                tokens[name] = x.masked_fill(~mask, torch.nan)
        tokens["mask"] = mask
    if packed:
        starts = list(itertools.accumulate(lengths, initial=0))
        tokens["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32)
    tokens |= {"targets": targets, "temperature": temperature}
    tokens["kl_coef"] = draw(st.sampled_from([None, 0.3, torch.tensor(0.3)]))
    tokens = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in tokens.items()}
    logits = strided(logits, draw(st.sampled_from(["dense", "sliced"])))
    return logits, tokens, draw(objectives()), draw(st.sampled_from([1.0, 7.0, 0.0]))


def expected(logits, tokens, objective, denominator):
    """Loss, metrics, gradient of the logits and largest coefficient, in float64."""
    exact = logits.detach().double().requires_grad_()
    temperature, mask = tokens["temperature"], tokens.get("mask")
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()
    logp, entropy = reference.logprobs(exact, tokens["targets"], temperature, mask)
    arguments = {k: x for k, x in tokens.items() if k not in ("targets", "temperature")}
    arguments |= {"logprobs": logp, "entropy": entropy}
    near = near_a_bound(arguments, objective)
    logp_64, entropy_64, loss, metrics = exact_loss(arguments, objective, denominator)
    by = torch.autograd.grad(loss, (logp_64, entropy_64), allow_unused=True)
    by = [torch.zeros_like(logp) if x is None else x for x in by]
    torch.autograd.backward([logp, entropy], by)
    size = max((x.abs().max().item() for x in by if x.numel()), default=0.0)
    return logp, loss, metrics, exact.grad, size, near


@each_backend
def test_loss_metrics_and_gradient_equal_float64(backend):
    @settings(max_examples=examples(backend, 75))
    @given(cases(backend))
    def check(case):
        logits, tokens, objective, denominator = case
        logp_64, loss_64, metrics_64, gradient_64, size, near = expected(*case)
        if near:
            return
        logits = logits.detach().requires_grad_()
        result = ops.policy_loss_from_logits(
            logits, objective=objective, denominator=denominator, backend=backend, **tokens
        )
        finite = logits.detach().double().nan_to_num(0, 0, 0).abs()
        largest = finite.amax().item() if logits.numel() else 0
        spread = 1 + min(largest, 1e4 if largest > 1e3 else 200.0) / 10
        relative, absolute = LOGPROB_RELATIVE * spread, LOGPROB_ABSOLUTE * spread
        assert_close(
            result.logprobs, logp_64, relative=relative, absolute=absolute, what="logprobs"
        )
        tokens_64 = max(1.0, metrics_64[ops.METRICS.index("tokens")].item())
        absolute = 30 * tokens_64 * (SUM_RELATIVE + LOGPROB_ABSOLUTE * spread)
        for name, actual, exact in (
            ("loss", result.loss, loss_64),
            ("metrics", result.metrics, metrics_64),
        ):
            assert_close(
                actual, exact, relative=SUM_RELATIVE * spread, absolute=absolute, what=name
            )
        (result.loss * 0.5).backward()
        # p (log p + H) cancels, and an error of logp is one of the coefficient
        absolute = (GRADIENT_RELATIVE * size + GRADIENT_ABSOLUTE) * spread
        assert_close(
            logits.grad,
            0.5 * gradient_64,
            what="gradient",
            relative=GRADIENT_RELATIVE * spread,
            absolute=absolute,
        )

    check()


def arguments(rows: int = 3, steps: int = 4, vocab: int = 50) -> dict:
    """Tensors that every objective can do with."""
    torch.manual_seed(0)
    logits = torch.randn(rows, steps, vocab, device=DEVICE)
    targets = torch.randint(0, vocab, (rows, steps), device=DEVICE)
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    names = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
    near = {name: logp + 0.1 * torch.randn_like(logp) for name in names}
    return {
        "logits": logits,
        "targets": targets,
        "advantages": torch.randn(rows, device=DEVICE),
        "denominator": 5.0,
        **near,
    }


@each_backend
def test_far_above_the_reference_and_without_a_logprob_of_the_sampler(backend):
    given = arguments()
    given["ref_logprobs"] -= 25
    given["sampler_logprobs"][0, 1] = torch.nan
    objective = OBJECTIVES["grpo_icepop"].replace(correction_nan="mask")
    result, gradient = run(backend, objective, **given)
    logits, denominator = given.pop("logits"), given.pop("denominator")
    tokens = given | {"temperature": 1.0}
    _, loss, metrics, wanted, _, _ = expected(logits, tokens, objective, denominator)
    assert_close(result.loss, loss, relative=SUM_RELATIVE, absolute=1e-6, what="loss")
    assert_close(result.metrics, metrics, relative=SUM_RELATIVE, absolute=1e-5, what="metrics")
    assert_close(gradient, wanted, relative=1e-4, absolute=1e-6, what="gradient")


def run(backend, objective, *, inplace=False, factor=1.0, **given):
    """Result, and the gradient of the logits."""
    leaf = given.pop("logits").clone().requires_grad_()
    logits = leaf * 1.0
    result = ops.policy_loss_from_logits(
        logits, objective=objective, inplace=inplace, backend=backend, **given
    )
    (factor * result.loss).backward()
    return result, leaf.grad


@each_backend
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_one_read_equals_two(backend, name, on_policy):
    given = arguments()
    if on_policy:
        given["old_logprobs"] = None
    objective = OBJECTIVES[name].replace(entropy_coef=0.01)
    result, gradient = run(backend, objective, **given)
    logits = given.pop("logits").requires_grad_()
    logp, entropy = ops.logprobs_and_entropy(logits, given.pop("targets"), backend=backend)
    loss, metrics = ops.policy_loss(
        logp,
        given.pop("old_logprobs"),
        given.pop("advantages"),
        objective,
        entropy=entropy,
        backend=backend,
        **given,
    )
    loss.backward()
    for actual, composed in (
        (result.loss, loss),
        (result.metrics, metrics),
        (gradient, logits.grad),
        (result.logprobs, logp),
        (result.entropy, entropy),
    ):
        torch.testing.assert_close(actual, composed.detach(), rtol=2e-5, atol=2e-6)


@each_backend
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_inplace_has_the_same_bits_and_no_second_backward(backend, objective):
    given = arguments()
    plain, gradient = run(backend, objective, factor=0.5, **given)
    inplace, over = run(backend, objective, factor=0.5, inplace=True, **given)
    assert torch.equal(gradient, over) and torch.equal(plain.loss, inplace.loss)
    logits = given.pop("logits").requires_grad_()
    working = logits * 1.0
    loss = ops.policy_loss_from_logits(
        working, objective=objective, inplace=True, backend=backend, **given
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="to go through the graph twice"):
        loss.backward()


@each_backend
@pytest.mark.parametrize("vocab", [7, 1000, 8193])
def test_a_gradient_of_16_bits_is_that_of_float32_logits_rounded(backend, vocab, monkeypatch):
    given = arguments(vocab=vocab)
    given["logits"][1, 2, 3], given["logits"][2, 0, :5] = torch.nan, -torch.inf
    given["targets"][0, 0], given["targets"][2, 0] = -1, 6
    mask = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    mask[0, 1] = False
    seen = last_arguments(operator_module, "policy_loss_from_logits", monkeypatch)
    objective = OBJECTIVES["grpo"].replace(entropy_coef=0.1)
    run(backend, objective, mask=mask, **given)
    (wanted,) = seen
    for dtype in roundings(backend):
        gradient = apart(wanted.grad_logits, dtype)
        logprobs = torch.empty_like(wanted.forward.logprobs)
        forward = wanted.forward._replace(logprobs=logprobs)
        launch = wanted._replace(forward=forward, grad_logits=gradient)
        dispatch.load(backend).policy_loss_from_logits(launch)
        rounded = wanted.grad_logits.to(dtype)
        torch.testing.assert_close(gradient, rounded, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            logprobs, wanted.forward.logprobs, rtol=0, atol=0, equal_nan=True
        )
        assert gradient._base[..., vocab:].isnan().all()
    assert rounded.isnan().any(-1).sum() == 2 and (rounded[0, 1] == 0).all()


@each_backend
def test_a_second_backward_is_refused(backend):
    given = arguments()
    logits = given.pop("logits").requires_grad_()
    loss = ops.policy_loss_from_logits(logits, objective="ppo", backend=backend, **given).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="computes its gradient once.*graph twice"):
        loss.backward()


@each_backend
def test_masked_slots_are_not_read(backend):
    given = arguments()
    mask = torch.rand(3, 4, device=DEVICE) < 0.5
    given["targets"][0, 0], mask[0, 0] = -100, True
    clean, gradient = run(backend, "grpo", mask=mask, **given)
    skipped = ~mask | (given["targets"] == -100)
    for name in ("logits", "old_logprobs", "ref_logprobs", "sampler_logprobs"):
        for value in (torch.nan, torch.inf):
            poisoned = {**given, name: given[name].clone()}
            poisoned[name][skipped] = value
            result, other = run(backend, "grpo", mask=mask, **poisoned)
            assert torch.equal(result.metrics, clean.metrics) and torch.equal(other, gradient)
    assert (gradient[skipped] == 0).all() and (clean.logprobs[skipped] == 0).all()


@each_backend
def test_packed_equals_padded_and_tokens_of_no_sequence_are_skipped(backend):
    given = arguments(rows=2, steps=3)
    padded, gradient = run(backend, "grpo", **given)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)

    def pack(x):
        extra = x.new_full((2, *x.shape[2:]), torch.nan if x.is_floating_point() else 0)
        return torch.cat([x.flatten(0, 1), extra])

    packed = {
        k: pack(x) if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in given.items()
    }
    result, other = run(backend, "grpo", cu_seqlens=starts, **packed)
    assert torch.equal(result.loss, padded.loss) and torch.equal(result.metrics, padded.metrics)
    assert torch.equal(other[:6], gradient.flatten(0, 1)) and (other[6:] == 0).all()


@each_backend
@pytest.mark.parametrize("vocab", [8192, 20001])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend, vocab):
    given = arguments(rows=1, steps=5, vocab=vocab)
    given["advantages"] = torch.randn(1, 5, device=DEVICE)
    batch, gradient = run(backend, "dapo", **given)
    for step in (0, 4):
        one = {
            k: x[:, step : step + 1].contiguous() if isinstance(x, torch.Tensor) else x
            for k, x in given.items()
        }
        alone, own = run(backend, "dapo", **one)
        assert torch.equal(alone.logprobs[0, 0], batch.logprobs[0, step])
        assert torch.equal(own[0, 0], gradient[0, step])


@each_backend
def test_a_nan_or_a_target_out_of_range_poisons_its_row(backend):
    given = arguments(rows=1)
    given["logits"][0, 1, 3] = torch.nan
    given["logits"][0, 2] = -torch.inf
    given["targets"][0, 3] = 99
    result, gradient = run(backend, "gpg", **given)
    assert result.logprobs.isnan().tolist() == [[False, True, True, True]]
    assert gradient.isnan().all(-1).tolist() == [[False, True, True, True]]
    assert gradient[0, 0].isfinite().all() and result.loss.isnan()


@each_backend
def test_half_range_and_a_cold_temperature(backend):
    if torch.float16 not in dtypes(backend):
        pytest.skip("the interpreter is held to float32")
    logits = torch.tensor([[[65504.0, -65504.0, 65472.0]]], device=DEVICE, dtype=torch.float16)
    targets, advantages = torch.tensor([[2]], device=DEVICE), torch.ones(1, device=DEVICE)
    for temperature in (1.0, 0.01, 32.0):
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = ops.policy_loss_from_logits(
            leaf, targets, advantages, "gpg", temperature=temperature, backend=backend
        ).loss
        loss.backward()
        logp, _ = reference.logprobs(exact, targets, temperature)
        (-logp.sum()).backward()
        assert_close(loss, -logp.sum(), relative=1e-5, absolute=1e-5, what="loss")
        assert_close(leaf.grad, exact.grad, relative=1e-4, absolute=1e-6, what="gradient")


@each_backend
def test_without_tokens_the_loss_is_zero(backend):
    for rows, steps in ((0, 3), (2, 0)):
        given = arguments(rows=rows, steps=steps)
        result, gradient = run(backend, "ppo", **given)
        assert result.loss == 0 and gradient.shape == (rows, steps, 50)
    given = arguments()
    given["denominator"] = None
    result, gradient = run(backend, "grpo", mask=torch.zeros(3, 4, device=DEVICE) > 0, **given)
    assert result.loss == 0 and (gradient == 0).all()


@each_backend
def test_row_offsets_pass_two_to_the_31(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip(
            "the interpreter copies the storage of 4 GiB; test_triton_compile checks the types"
        )
    vocab, gap = 128, 2**31 + 64
    storage = torch.empty(gap + vocab, dtype=torch.bfloat16, device=DEVICE)
    logits = storage.as_strided((1, 2, vocab), (0, gap, 1))
    logits.copy_(torch.randn(1, 2, vocab))
    dense, targets = logits.clone(), torch.tensor([[3, 100]], device=DEVICE)
    advantages = torch.tensor([[1.0, -2.0]], device=DEVICE)
    gradients = []
    for x, inplace in ((dense, False), (logits, True)):
        x = x.detach().requires_grad_()
        loss = ops.policy_loss_from_logits(
            x, targets, advantages, "gpg", inplace=inplace, backend=backend
        ).loss
        gradients.append(torch.autograd.grad(2 * loss, x)[0])
    assert torch.equal(*gradients) and (gradients[0] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_opcheck(backend):
    given = arguments(rows=2, vocab=20)
    objective = Objective(
        correction="truncate",
        surrogate="dual_clip",
        kl_gradient="k2",
        entropy_coef=0.2,
        aggregation="sequence-mean-token-mean",
    )
    inputs = PolicyLossFromLogitsInputs(
        logits=given["logits"].requires_grad_(),
        targets=given["targets"],
        temperature=0.8,
        token_temperature=None,
        valid=torch.rand(2, 4, device=DEVICE) < 0.7,
        cu_seqlens=None,
        old_logprobs=given["old_logprobs"],
        advantages=torch.randn(2, 4, device=DEVICE),
        ref_logprobs=given["ref_logprobs"],
        sampler_logprobs=given["sampler_logprobs"],
        objective=objective.arguments,
        kl_penalty=KlPenaltyArguments(kl=3, kl_coef=0.1, adaptive_kl_coef=None),
        denominator=DenominatorArguments(2.0, None),
        inplace=False,
        backend=backend,
    )
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(_operator, inputs, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(logits, targets, advantages, mask):
        return ops.policy_loss_from_logits(
            logits * 1.5, targets, advantages, "gspo", mask=mask, denominator=4.0, backend=backend
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (4, 6):
        given = arguments(steps=steps)
        logits, mask = given["logits"].requires_grad_(), torch.rand(3, steps, device=DEVICE) < 0.8
        results = []
        for function in (loss, compiled):
            logits.grad = None
            value = function(logits, given["targets"], given["advantages"], mask)
            (2 * value).backward()
            results.append((value.detach(), logits.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
A = torch.zeros(2)


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        ((X, Y, A, "grppo"), {}, "objective must be one of reinforce"),
        ((X[0], Y[0], A, "ppo"), {}, r"logits must be \(B, T, V\), or \(N, V\) together with"),
        ((X.double(), Y, A, "ppo"), {}, r"logits must be float32"),
        ((X, Y[:1], A, "ppo"), {}, r"targets must be of shape \(2, 3\)"),
        ((X, Y, A[:1], "ppo"), {}, r"one per token, \(2, 3\), or one per sequence, \(2,\)"),
        ((X, Y, A, "ppo"), {"old_logprobs": A}, r"old_logprobs must be of shape \(2, 3\)"),
        ((X, Y, A, "grpo"), {}, "kl_coef = 0.04 needs ref_logprobs"),
        ((X, Y, A, "grpo_tis"), {"ref_logprobs": X[..., 0]}, "needs sampler_logprobs"),
        ((X, Y, A, "dr_grpo"), {}, "needs denominator"),
        ((X, Y, A, "ppo"), {"temperature": 0.0}, "temperature must be finite and > 0"),
        ((X, Y, A, "ppo"), {"mask": X[..., 0]}, r"mask must be bool \| uint8"),
        ((X, Y, A, "ppo"), {"inplace": True, "backend": "reference"}, "inplace is not supported"),
        ((X[:1].expand(2, 3, 5), Y, A, "ppo"), {"inplace": True}, "must not overlap"),
    ],
)
def test_bad_arguments_are_named(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss_from_logits(*tensors, **options)
