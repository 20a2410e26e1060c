"""Scalars, integers and shapes that callers bring: taken as they are, or refused with the cure."""

import dataclasses

import pytest
import torch

from tests.kernels.backends import BACKENDS, DEVICE, each_backend
from tests.kernels.operations import OPERATIONS, Operation
from tests.kernels.test_contract import assert_same, run
from warpo.kernels import ops

BY_NAME = {operation.name: operation for operation in OPERATIONS}
LOSSES = (
    "policy_loss",
    "policy_loss_from_logits",
    "policy_loss_from_hidden",
    "value_loss",
    "aggregate",
    "preference_loss",
    "reward_model_loss",
    "ranking_loss",
    "kto_loss",
)
HEADS = (
    "logprobs",
    "linear_logprobs",
    "kept_set_logprobs",
    "policy_loss_from_logits",
    "policy_loss_from_hidden",
)


@pytest.mark.parametrize("name", LOSSES)
@each_backend
def test_a_denominator_of_0_gives_0_whatever_the_tokens_hold(name, backend):
    tensors = BY_NAME[name].tensors()
    # a logit that is NaN poisons its row of the gradient all the same
    planted = "advantages" if "advantages" in tensors else BY_NAME[name].floats[0]
    tensors[planted].view(-1)[0] = torch.nan
    for denominator in (0, torch.zeros((), device=DEVICE)):
        operation = _with(name, denominator=denominator)
        for chosen in (backend, "reference"):
            results, gradients = run(operation, tensors, chosen)
            assert results[0] == 0
            assert all((gradient == 0).all() for gradient in gradients), (chosen, gradients)
    negative = _with(name, denominator=-torch.ones((), device=DEVICE))
    for chosen in (backend, "reference"):
        assert run(negative, BY_NAME[name].tensors(), chosen)[0][0].isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_a_denominator_is_any_real_number(name):
    tensors = BY_NAME[name].tensors()
    wanted = run(_with(name, denominator=3.0), tensors, "reference")
    for dtype in (torch.int64, torch.int32, torch.float64, torch.bfloat16, torch.float32):
        count = torch.full((), 3, dtype=dtype, device=DEVICE)
        assert_same(run(_with(name, denominator=count), tensors, "reference"), wanted)
    with pytest.raises(ValueError, match=r"denominator.*reshape\(\(\)\)"):
        run(_with(name, denominator=torch.ones(1, device=DEVICE)), tensors, "reference")
    with pytest.raises(ValueError, match=r"denominator requires grad.*detach"):
        weight = torch.ones((), device=DEVICE, requires_grad=True)
        run(_with(name, denominator=weight), tensors, "reference")


@pytest.mark.parametrize("name", HEADS)
@each_backend
def test_temperatures(name, backend):
    if name.startswith("policy_loss") and backend == "triton" and DEVICE == "cpu":
        pytest.skip("its interpreter is slow, and the checks are those of the other backends")
    tensors = BY_NAME[name].tensors()
    tokens = tensors["targets"].shape
    wanted = run(_with(name, temperature=0.5), tensors, backend)
    half = torch.full((), 0.5, device=DEVICE)
    for same in (half, half.expand(tokens)):
        assert_same(run(_with(name, temperature=same), tensors, backend), wanted)
    for number in (0.0, -1.0, torch.inf, torch.nan):
        for chosen in (backend, "reference"):
            with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
                run(_with(name, temperature=number), tensors, chosen)
    with pytest.raises(ValueError, match=r"temperature must be float32.*temperature.float\(\)"):
        run(_with(name, temperature=half.double()), tensors, backend)
    if len(tokens) == 2:
        with pytest.raises(ValueError, match=r"temperature.*pass temperature.expand\(\(3, 9\)\)"):
            run(_with(name, temperature=half.expand(3, 1)), tensors, backend)


@pytest.mark.parametrize("name", HEADS[:3])
@each_backend
@pytest.mark.parametrize("number", [0.0, -1.0, torch.inf, torch.nan])
def test_a_temperature_without_a_distribution_poisons_its_token(name, backend, number):
    tensors = BY_NAME[name].tensors()
    tokens = tensors["targets"].shape
    temperature = torch.ones(tokens, device=DEVICE)
    temperature.view(-1)[0] = number
    hidden = BY_NAME[name].differentiable[0]
    for chosen in (backend, "reference"):
        (logp, *_), gradients = run(_with(name, temperature=temperature), tensors, chosen)
        assert logp.view(-1)[0].isnan() and logp.view(-1)[1:].isfinite().all()
        own = gradients[BY_NAME[name].differentiable.index(hidden)].flatten(0, -2)
        assert own[0].isnan().all() and own[1:].isfinite().all(), (chosen, own)


def test_int32_targets_and_ids_are_taken():
    backend = BACKENDS[0]  # they are converted before a backend sees them
    for name, argument, options in (
        *((head, "targets", {}) for head in HEADS),
        ("ranking_loss", "ranks", {}),
    ):
        tensors = BY_NAME[name].tensors()
        short = tensors | {argument: tensors[argument].int()}
        operation = _with(name, **options)
        assert_same(run(operation, short, backend), run(operation, tensors, backend))
    rewards, ids = torch.arange(6.0, device=DEVICE), torch.arange(6, device=DEVICE) % 2
    for dtype in (torch.int32, torch.int64):
        result = ops.group_advantages(
            rewards, group_ids=ids.to(dtype), num_groups=2, backend=backend
        )
        assert torch.equal(result.mean, torch.tensor([2.0, 3.0], device=DEVICE))
    steps = BY_NAME["process_advantages"].tensors()
    results = [
        ops.process_advantages(
            **steps, num_tokens=9, group_ids=ids[:4].to(dtype), num_groups=2, backend=backend
        )
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(results[0].advantages, results[1].advantages)


X = torch.zeros(2, 3, device=DEVICE)
Y = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
SCALAR = torch.full((), 0.5, device=DEVICE)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.logprobs(X[:, None].expand(2, 3, 3), Y.short()), r"pass targets.long\(\)"),
        (lambda: ops.logprobs(X.double(), Y[:, 0]), r"pass logits.float\(\)"),
        (lambda: ops.group_advantages(Y[0], 3), r"rewards must be float32.*pass rewards.float\(\)"),
        (lambda: ops.gae(X.double(), X, gamma=1.0, gae_lambda=1.0), r"pass rewards.float\(\)"),
        (
            lambda: ops.gae(X[0], X[0], gamma=1.0, gae_lambda=1.0, cu_seqlens=Y[0, :2]),
            r"cu_seqlens must be int32, got int64: pass cu_seqlens.int\(\)",
        ),
        (
            lambda: ops.policy_loss(X, X, X[:, :1], "ppo"),
            r"advantages must be.*pass advantages.squeeze\(1\)",
        ),
        (lambda: ops.gae(X, X, gamma=SCALAR, gae_lambda=1.0), r"gamma must be a number, got a Ten"),
        (lambda: ops.gae(X, X, gamma=X[0], gae_lambda=1.0), r"pass gamma.item\(\)"),
        (lambda: ops.discounted_returns(X, gamma=SCALAR), r"pass gamma.item\(\)"),
        (
            lambda: ops.logprobs(
                X.view(-1).as_strided((2, 3), (1, 1)), Y[:, 0], inplace_backward=True
            ),
            r"logits is written to.*pass logits.contiguous\(\)",
        ),
        (lambda: ops.whiten(X, eps=SCALAR), r"pass eps.item\(\)"),
        (lambda: ops.value_loss(X, X, X, clip_range=X[0]), r"pass clip_range.item\(\)"),
        (lambda: ops.vtrace(X, X, X, X, gamma=1.0, rho_max=SCALAR), r"pass rho_max.item\(\)"),
    ],
)
def test_errors_name_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _with(name: str, **options: object) -> Operation:
    operation = BY_NAME[name]
    return dataclasses.replace(operation, options={**operation.options, **options})
