from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends import BACKENDS, DEVICE, DTYPES, dtypes, each_backend, examples
from tests.kernels.gpu_products import as_on_a_gpu
from tests.kernels.opcheck import opcheck
from tests.tolerance import HEAD_GRADIENT, ROUNDING, SUM_RELATIVE, assert_close, head_gradient
from warpo.kernels import _linear_head_plan, _matrix_product, ops, reference


def problem(
    seed: int,
    packed: bool,
    old_given: bool,
    per_token: bool,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    masked: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Tensors to differentiate, and the others by name."""
    generator = torch.Generator().manual_seed(seed)
    batch, steps, size, vocab = 4, 7, 12, 61

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    leaves = {"hidden": random(batch, steps, size), "weight": random(vocab, size)}
    leaves["bias"] = random(vocab)
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    targets = torch.randint(0, vocab, (batch, steps), generator=generator)
    mask = torch.rand(batch, steps, generator=generator) < (0.7 if masked else 2.0)
    mask[1] &= not masked
    floats = [x.double() for x in leaves.values()]
    logp, _ = reference.linear_logprobs(
        *floats[:2], targets, mask=mask, bias=floats[2], softcap=softcap
    )
    near = [(logp + 0.1 * random(batch, steps)).float() for _ in range(3)]
    near = [x.masked_fill(~mask, torch.nan) for x in near]
    leaves["hidden"] = leaves["hidden"].masked_fill(~mask[..., None], torch.nan)
    rest = {
        "targets": targets,
        "old_logprobs": near[0] if old_given else None,
        "advantages": random(batch, steps) if per_token else random(batch),
        "mask": mask,
        "ref_logprobs": near[1],
        "sampler_logprobs": near[2],
    }
    if packed:
        leaves["hidden"] = leaves["hidden"].flatten(0, 1)
        rest = {k: x if x is None or x.dim() == 1 else x.flatten() for k, x in rest.items()}
        rest["cu_seqlens"] = steps * torch.arange(batch + 1, dtype=torch.int32)
    place = [
        {k: None if x is None else x.to(DEVICE) for k, x in group.items()}
        for group in (leaves, rest)
    ]
    return {k: x.requires_grad_() for k, x in place[0].items()}, place[1]


def exactly(leaves, rest, objective, denominator: float, softcap: float | None):
    """Loss, metrics and gradients in float64."""
    exact = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    rest = {
        k: x.double() if x is not None and x.is_floating_point() else x for k, x in rest.items()
    }
    targets, old, advantages = (rest[k] for k in ("targets", "old_logprobs", "advantages"))
    logp, entropy = reference.linear_logprobs(
        exact["hidden"],
        exact["weight"],
        targets,
        mask=rest["mask"],
        bias=exact["bias"],
        softcap=softcap,
    )
    if advantages.shape != targets.shape:
        steps = 7
        advantages = advantages.repeat_interleave(steps).view(targets.shape)
    loss, metrics = reference.policy_loss(
        logp,
        logp.detach() if old is None else old,
        advantages,
        objective,
        torch.tensor(denominator, dtype=torch.float64, device=DEVICE),
        mask=rest["mask"],
        cu_seqlens=rest.get("cu_seqlens"),
        sampler=rest["sampler_logprobs"],
        entropy=entropy,
        ref=rest["ref_logprobs"] if objective.kl_coef else None,
    )
    (2 * loss).backward()
    return loss, metrics, {k: x.grad for k, x in exact.items()}


def check_loss_and_gradients(data, backend: str, dtype: torch.dtype, rounding: float) -> None:
    """Against float64; rounding: of a gradient whose largest element is 1."""
    choice = st.booleans()
    softcap = data.draw(st.sampled_from([None, 4.0]))
    leaves, rest = problem(
        data.draw(st.integers(0, 2**31)), *(data.draw(choice) for _ in range(3)), dtype, softcap
    )
    name = data.draw(st.sampled_from(sorted(ops.OBJECTIVES)))
    objective = ops.OBJECTIVES[name]
    if data.draw(choice):
        objective = objective.replace(entropy_coef=0.05)
    if objective.correction != "none" and data.draw(choice):
        objective = objective.replace(correction_nan="mask")
        rest["sampler_logprobs"].view(-1)[::5] = torch.nan
    result = ops.policy_loss_from_hidden(
        leaves["hidden"],
        leaves["weight"],
        objective=objective,
        bias=leaves["bias"],
        softcap=softcap,
        denominator=17.0,
        workspace_bytes=3000,
        backend=backend,
        **rest,
    )
    wanted, metrics, gradients = exactly(leaves, rest, objective, 17.0, softcap)
    assert_close(result.loss, wanted, relative=1e-4, absolute=1e-5, what="loss")
    # counts of what a bound holds are exact: no ratio here lies within rounding of one
    assert_close(result.metrics, metrics, relative=10 * SUM_RELATIVE, absolute=2e-4, what="metrics")
    (2 * result.loss).backward()
    for key, x in leaves.items():
        scale = gradients[key].abs().max().item()
        assert_close(
            x.grad,
            gradients[key],
            relative=1e-4,
            what=f"gradient of {key}",
            absolute=4 * rounding * (0.1 + scale),
        )


@each_backend
def test_loss_and_gradients_of_every_objective_equal_float64(backend):
    @settings(max_examples=examples(backend, 100), deadline=None)
    @given(st.data(), st.sampled_from(dtypes(backend)[:2]))
    def check(data, dtype):
        rounding = head_gradient(torch.empty(0, dtype=dtype, device=DEVICE))
        check_loss_and_gradients(data, backend, dtype, rounding)

    check()


@pytest.mark.skipif(DEVICE != "cpu", reason="what the other tests show on a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_with_the_plan_of_a_gpu_equal_float64(dtype):
    """Gradients of the logits in the dtype of the products, in blocks of chunks."""
    rounding = HEAD_GRADIENT + (ROUNDING[dtype] if dtype != torch.float32 else 0.0)

    @settings(max_examples=60, deadline=None)
    @given(st.data(), st.sampled_from([1, 2, 128]), st.sampled_from([1, 3, 1024]))
    def check(data, tile, chunk):
        with as_on_a_gpu(), patch.multiple(_linear_head_plan, TILE=tile, GPU_TOKENS=chunk):
            check_loss_and_gradients(data, "cpu", dtype, rounding)

    check()


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_three_matrix_products_where_a_token_knows_its_coefficient(backend, monkeypatch):
    multiply, calls = _matrix_product.multiply, []

    def counted(*arguments, **options):
        calls.append(arguments)
        multiply(*arguments, **options)

    monkeypatch.setattr(_matrix_product, "multiply", counted)
    cases = (
        ("grpo", True, None, 3),
        ("gspo", False, None, 3),
        # with the logits kept, and where those of all tokens do not fit
        ("gspo", True, None, 3),
        ("gspo", True, 4 * 4 * 7 * 61 - 1, 4),
    )
    for name, old_given, room, products in cases:
        calls.clear()
        leaves, rest = problem(0, True, old_given, False)
        result = ops.policy_loss_from_hidden(
            leaves["hidden"],
            leaves["weight"],
            objective=name,
            workspace_bytes=room,
            backend=backend,
            **rest,
        )
        result.loss.backward()
        assert len(calls) == products
    calls.clear()
    with torch.no_grad():
        ops.policy_loss_from_hidden(
            leaves["hidden"], leaves["weight"], objective="grpo", backend=backend, **rest
        )
    assert len(calls) == 1


@each_backend
def test_the_same_as_policy_loss_of_linear_logprobs(backend):
    leaves, rest = problem(5, False, True, False)
    constants = {k: x for k, x in rest.items() if k != "targets"}
    result = ops.policy_loss_from_hidden(
        leaves["hidden"], leaves["weight"], objective="grpo", backend=backend, **rest
    )
    logp, entropy = ops.linear_logprobs_and_entropy(
        leaves["hidden"], leaves["weight"], rest["targets"], mask=rest["mask"], backend=backend
    )
    plain = ops.policy_loss(
        logp, objective="grpo", entropy=entropy.detach(), backend=backend, **constants
    )
    torch.testing.assert_close(result.logprobs, logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.loss, plain.loss)
    torch.testing.assert_close(result.metrics, plain.metrics)
    inputs = (leaves["hidden"], leaves["weight"])
    gradients = [torch.autograd.grad(x.loss, inputs) for x in (result, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@each_backend
def test_tokens_outside_all_sequences_and_ignored_targets_count_for_nothing(backend):
    leaves, rest = problem(6, True, True, False, masked=False)
    inside = slice(3, 21)
    rest["cu_seqlens"] = torch.tensor([3, 9, 14, 21], device=DEVICE, dtype=torch.int32)
    rest["advantages"] = rest["advantages"][:3]
    rest["targets"][5] = -100
    leaves["hidden"] = leaves["hidden"].detach().clone()
    leaves["hidden"][:3] = leaves["hidden"][21:] = leaves["hidden"][5] = torch.nan
    leaves["hidden"].requires_grad_()
    result = ops.policy_loss_from_hidden(
        leaves["hidden"], leaves["weight"], objective="grpo", backend=backend, **rest
    )
    cut = {
        k: x[inside] if x is not None and k not in ("cu_seqlens", "advantages") else x
        for k, x in rest.items()
    }
    cut["cu_seqlens"] = rest["cu_seqlens"] - 3
    part = ops.policy_loss_from_hidden(
        leaves["hidden"][inside], leaves["weight"], objective="grpo", backend=backend, **cut
    )
    torch.testing.assert_close(result.loss, part.loss)
    assert result.metrics[ops.METRICS.index("tokens")] == 17
    inputs = (leaves["hidden"], leaves["weight"])
    gradients = [torch.autograd.grad(x.loss, inputs) for x in (result, part)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert (gradients[0][0][21:] == 0).all() and gradients[0][0].isfinite().all()


@each_backend
def test_nothing_valid_gives_zero(backend):
    leaves, rest = problem(7, False, True, False)
    rest["mask"] = torch.zeros_like(rest["mask"])
    result = ops.policy_loss_from_hidden(
        leaves["hidden"], leaves["weight"], objective="dapo", backend=backend, **rest
    )
    gradients = torch.autograd.grad(result.loss, (leaves["hidden"], leaves["weight"]))
    assert result.loss == 0 and all((x == 0).all() for x in gradients)


@each_backend
def test_runs_are_bit_equal_and_a_graph_can_be_walked_twice(backend):
    leaves, rest = problem(8, True, True, True)
    inputs = (leaves["hidden"], leaves["weight"])

    def once():
        result = ops.policy_loss_from_hidden(
            *inputs, objective="grpo", workspace_bytes=3000, backend=backend, **rest
        )
        first = torch.autograd.grad(result.loss, inputs, retain_graph=True)
        second = torch.autograd.grad(result.loss, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return (*result, *first)

    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(once(), once(), strict=True)
    )


@each_backend
def test_opcheck(backend, monkeypatch):
    from warpo.kernels import _policy_loss_from_hidden as module

    seen, operator = [], module._operator
    monkeypatch.setattr(module, "_operator", lambda x: seen.append(x) or operator(x))
    leaves, rest = problem(9, False, True, False)
    inputs = (leaves["hidden"], leaves["weight"])
    ops.policy_loss_from_hidden(
        *inputs, objective="grpo", bias=leaves["bias"], backend=backend, **rest
    )
    opcheck(operator, seen[0])


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    leaves, rest = problem(10, True, True, False)

    def loss(hidden, weight):
        return ops.policy_loss_from_hidden(
            hidden * 2, weight, objective="grpo", backend=backend, **rest
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (leaves["hidden"], leaves["weight"])
    eager, traced = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


H, W, Y = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
OLD, A = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((H.double(), W, Y, A, "dapo"), {}, "hidden must be float32"),
        ((H, W, Y, A, "nope"), {}, "objective must be one of"),
        (
            (H[0], W, Y[0], A, "dapo"),
            {"old_logprobs": OLD[0]},
            r"must be \(B, T\), or \(N,\)",
        ),
        (
            (H, W, Y, A, "dapo"),
            {"old_logprobs": OLD[:1]},
            r"must be of shape \(2, 3\)",
        ),
        ((H, W, Y, A[:1], "dapo"), {}, "advantages must be one per token"),
        ((H, W, Y, A, "grpo"), {}, "kl_coef = 0.04 needs ref_logprobs"),
        ((H, W, Y, A, "dr_grpo"), {}, "needs denominator"),
        ((H, W, Y, A, "grpo_tis"), {"ref_logprobs": OLD}, "needs sampler_logprobs"),
        ((H, W, Y, A, "dapo"), {"softcap": -1.0}, "softcap must be > 0"),
        ((H, W, Y, A, "dapo"), {"logits_dtype": "half"}, "logits_dtype must be"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss_from_hidden(*arguments, **options)
