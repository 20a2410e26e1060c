import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    each_backend,
    each_backend_slow_triton,
    examples,
)
from tests.kernels.opcheck import opcheck
from tests.kernels.scans import assert_scan_close, every_case, on_rows, scan_cases
from tests.oracles import shaped_gae as oracle
from warpo.kernels import ops, reference
from warpo.kernels._scan import Steps, as_inputs
from warpo.kernels._shaped_gae import ShapedGaeInputs, _operator
from warpo.kernels.objectives import KL_ESTIMATORS

RESULTS = ("advantages", "returns", "rewards")
PER_STEP = ("logprobs", "ref_logprobs", "values", "rewards")
NUMBERS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([1.0, 0.99, 0.0]),
        "gae_lambda": st.sampled_from([1.0, 0.95, 0.0]),
        "kl_coef": st.sampled_from([0.0, 0.05, 1.0]),
        "kl_estimator": st.sampled_from(KL_ESTIMATORS),
        "entropy_coef": st.sampled_from([0.0, 0.1, 1.0]),
    }
)


@st.composite
def cases(draw, backend: str):
    floats, options, shape = draw(scan_cases(backend, PER_STEP, ends=False))
    which = draw(st.sampled_from(["rewards", "terminal_rewards", "both"]))
    if which != "rewards":
        bounds = options.get("cu_seqlens")
        rows = shape[0] if bounds is None else bounds.numel() - 1
        floats["terminal_rewards"] = torch.randn(rows, device=DEVICE).to(floats["values"].dtype)
    if which == "terminal_rewards":
        del floats["rewards"]
    return floats, options


@each_backend
def test_values_equal_float64(backend):
    @settings(max_examples=examples(backend, 120))
    @given(cases(backend), NUMBERS, st.booleans())
    def check(case, numbers, is_adaptive):
        floats, options = case
        exact = {name: x.double() for name, x in floats.items()}
        wanted = reference.shaped_gae(**exact, **options, **numbers)
        if is_adaptive:
            numbers = numbers | {"kl_coef": torch.tensor(numbers["kl_coef"], device=DEVICE)}
        result = ops.shaped_gae(
            **floats, **options, **numbers, return_rewards=True, backend=backend
        )
        # k3 of the test reaches 100
        for name, a, b in zip(RESULTS, result, wanted, strict=True):
            assert_scan_close(a, b, name, scale=100)

    check()


@each_backend_slow_triton
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
def test_every_mask_mode_in_every_layout_equals_float64(backend, kl_estimator):
    options = {"gamma": 0.9, "gae_lambda": 0.9, "kl_coef": 0.1, "kl_estimator": kl_estimator}
    options["entropy_coef"] = 0.2
    for floats, others, _ in every_case(PER_STEP, ends=False):
        floats["terminal_rewards"] = floats["last_values"].flip(0)
        result = ops.shaped_gae(**floats, **others, **options, return_rewards=True, backend=backend)
        exact = {name: x.double() for name, x in floats.items()}
        wanted = reference.shaped_gae(**exact, **others, **options)
        for name, a, b in zip(RESULTS, result, wanted, strict=True):
            assert_scan_close(a, b, name)


@settings(max_examples=40)
@given(cases("cpu"), NUMBERS)
def test_the_reference_equals_the_definition_of_the_papers(case, numbers):
    floats, options = case
    exact = {name: x.double().cpu() for name, x in floats.items()} | options | numbers
    wanted = on_rows(oracle.shaped_gae, exact, PER_STEP, 3)
    for a, b in zip(reference.shaped_gae(**exact), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_backend
def test_the_reward_of_a_response_is_on_its_last_valid_token(backend):
    logp, ref = torch.zeros(2, 4, 5, device=DEVICE)
    ref[:] = -0.5
    mask = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]],
        dtype=torch.bool,
        device=DEVICE,
    )
    logp[~mask] = torch.nan
    found = ops.shaped_gae(
        logp,
        ref,
        torch.zeros(4, 5, device=DEVICE),
        gamma=1.0,
        gae_lambda=1.0,
        kl_coef=0.5,
        terminal_rewards=torch.ones(4, device=DEVICE),
        mask=mask,
        return_rewards=True,
        backend=backend,
    )
    assert found.rewards[0].tolist() == [-0.25, -0.25, -0.25, -0.25, 0.75]
    assert found.rewards[1].tolist() == [-0.25, 0.75, 0, 0, 0]
    assert found.rewards[2].tolist() == [0, -0.25, 0, 0.75, 0]
    assert found.rewards[3].tolist() == [0] * 5
    assert found.returns[0].tolist() == [-0.25, 0, 0.25, 0.5, 0.75]
    assert found.returns[2].tolist() == [0, 0.5, 0, 0.75, 0]


@each_backend
@pytest.mark.parametrize("steps", [3, 40])
def test_k3_far_above_the_reference_is_not_clamped(backend, steps):
    logp = torch.full((2, steps), -1.0, device=DEVICE)
    for difference, kl in ((-25.0, 24.0), (-100.0, 99.0)):
        rewards = ops.shaped_gae(
            logp,
            logp + difference,
            torch.zeros_like(logp),
            rewards=torch.zeros_like(logp),
            gamma=1.0,
            gae_lambda=1.0,
            kl_coef=0.5,
            kl_estimator="k3",
            return_rewards=True,
            backend=backend,
        ).rewards
        assert torch.allclose(rewards, torch.full_like(logp, -0.5 * kl))


@each_backend
@pytest.mark.parametrize("steps", [3, 40])
def test_an_unexpected_token_has_a_bonus_of_its_surprise(backend, steps):
    logp = torch.full((2, steps), -2.0, device=DEVICE)
    logp[0, 1] = -torch.inf
    options = {"gamma": 1.0, "gae_lambda": 1.0, "kl_coef": 0.0, "backend": backend}
    zeros = torch.zeros_like(logp)
    tensors = (logp, logp.clamp(min=-9.0), zeros)
    rewards = ops.shaped_gae(
        *tensors, rewards=zeros, entropy_coef=0.25, return_rewards=True, **options
    ).rewards
    assert (rewards[1] == 0.5).all() and rewards[0, 0] == 0.5
    assert not rewards[0, 1].isfinite()


@each_backend
def test_shaped_rewards_are_given_on_request_alone(backend):
    tensors = torch.randn(4, 3, 40, device=DEVICE)
    options = {"gamma": 1.0, "gae_lambda": 0.9, "kl_coef": 0.1, "backend": backend}
    assert ops.shaped_gae(*tensors[:3], rewards=tensors[3], **options).rewards is None


@each_backend
@pytest.mark.parametrize("steps", [9, pytest.param(1200, marks=pytest.mark.slow)])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend, steps):
    tensors = torch.randn(4, 21, steps, device=DEVICE)
    options = {"gamma": 1.0, "gae_lambda": 0.9, "kl_coef": 0.1, "kl_estimator": "k3"}
    batch = ops.shaped_gae(*tensors[:3], rewards=tensors[3], **options, backend=backend)
    for row in (0, 16, 20):
        one = tensors[:, row : row + 1]
        alone = ops.shaped_gae(*one[:3], rewards=one[3], **options, backend=backend)
        assert torch.equal(alone.advantages[0], batch.advantages[row])


@each_backend
def test_opcheck(backend):
    tensors = torch.randn(3, 3, 9, device=DEVICE)
    flags = torch.rand(3, 9, device=DEVICE) < 0.7
    column, coef = torch.randn(3, 1, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    for return_rewards in (True, False):
        inputs = ShapedGaeInputs(
            logprobs=tensors[0],
            ref_logprobs=tensors[1],
            rewards=None,
            terminal_rewards=column,
            values=tensors[2],
            last_values=column,
            steps=as_inputs(Steps(mask=flags, mask_mode="compact"), 0.9, 0.9),
            adaptive_kl_coef=coef,
            kl=1,
            kl_coef=0.0,
            entropy_coef=0.1,
            log_ratio_limit=20.0,
            return_rewards=return_rewards,
            backend=backend,
        )
        opcheck(_operator, inputs)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def advantages(logp, ref, values, scores, coef):
        return ops.shaped_gae(
            logp,
            ref,
            values * 2,
            gamma=1.0,
            gae_lambda=0.95,
            kl_coef=coef,
            terminal_rewards=scores,
            backend=backend,
        ).advantages

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        scores, coef = torch.randn(3, device=DEVICE), torch.tensor(0.1, device=DEVICE)
        arguments = (*torch.randn(3, 3, steps, device=DEVICE), scores, coef)
        assert torch.equal(advantages(*arguments), compiled(*arguments))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"logprobs": X[0]}, "logprobs must be 2-D"),
        ({"ref_logprobs": X[0]}, r"ref_logprobs must be of shape \(2, 3\), got \(3,\)"),
        ({"values": X.clone().requires_grad_()}, r"values requires grad.*values.detach\(\)"),
        ({"kl_coef": -1.0}, "kl_coef must be finite and >= 0, got -1.0"),
        ({"kl_coef": X}, r"kl_coef must be of shape \(\), got \(2, 3\)"),
        ({"entropy_coef": -0.1}, "entropy_coef must be finite and >= 0, got -0.1"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, reverse_k3; got 'k4'"),
        ({"rewards": None}, r"give rewards \(one per token\), terminal_rewards"),
        ({"rewards": X[0]}, r"rewards must be of shape \(2, 3\), got \(3,\)"),
        ({"terminal_rewards": X[0]}, r"terminal_rewards must be of shape \(2,\), got \(3,\)"),
        ({"log_ratio_limit": 0.0}, r"log_ratio_limit must be in \(0, 80\], got 0.0"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"gae_lambda": 1.1}, r"gae_lambda must be in \[0, 1\], got 1.1"),
        ({"mask_mode": "skip"}, "mask_mode must be one of carry, zero, compact; got 'skip'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    numbers = {"gamma": 0.9, "gae_lambda": 0.9, "kl_coef": 0.1}
    with pytest.raises(ValueError, match=message):
        ops.shaped_gae(**dict.fromkeys(PER_STEP, X) | numbers | changed)
