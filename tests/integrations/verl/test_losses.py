import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("verl", reason="verl is not installed: make peers; then make test-integrations")
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

from warpo.engine.config.resolve import find  # noqa: E402
from warpo.engine.learner.covariance import choose  # noqa: E402
from warpo.kernels import ops  # noqa: E402
from warpo.kernels.integrations.patching import wrap  # noqa: E402
from warpo.kernels.integrations.verl import library  # noqa: E402

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
# of the micro-batch alone, and of a global batch
BATCH_INFO = (
    {},
    {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None},
    {"dp_size": 4, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 50},
)
LOSSES = ("vanilla", "gspo", "sapo", "cispo", "dro", "reinforce")


def actor_config(batch_info=(), dro_beta=0.1, **fields):
    loss = PolicyLossConfig(dro_beta=dro_beta)
    return ActorConfig(
        strategy="fsdp",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=loss,
        global_batch_info=dict(batch_info),
        **fields,
    )


@functools.cache  # to patch takes longer than to compute
def both(name):
    """The library's function and ours."""
    original = getattr(core_algos, name)
    with library.patch(only=[name]):
        return original, getattr(core_algos, name)


@st.composite
def masks(draw, shape, dtypes=(torch.bool, torch.int64, torch.float32)):
    """Rows without a valid token, too, but one token in all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    if draw(st.booleans()):
        mask[draw(st.integers(0, shape[0] - 1))] = False
    mask[-1, 0] = True
    return mask.to(draw(st.sampled_from(dtypes)))


@st.composite
def batches(draw):
    """old_log_prob, log_prob, advantages, response_mask, weights."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*size):
        return torch.randn(size, generator=generator)

    log_prob = -3 * normal(*shape).abs()
    old = log_prob + draw(st.sampled_from([0.0, 0.02, 0.5, 15.0])) * normal(*shape)
    advantages = normal(*(shape if draw(st.booleans()) else (shape[0], 1)))
    if draw(st.booleans()):
        advantages[0] = 0.0
    advantages = advantages.expand(shape).contiguous()
    weights = None
    if draw(st.booleans()):
        weights = (0.5 * normal(*shape)).exp().clamp(max=2.0)
        weights = torch.where(weights < 0.7, 0.0, weights)
        weights[-1, 0] = 1.0
    if draw(st.booleans()):
        log_prob = log_prob.t().contiguous().t()
    mask = draw(masks(shape))
    return old.to(dtype), log_prob.to(dtype), advantages.to(dtype), mask, weights


configs = st.builds(
    actor_config,
    st.sampled_from(BATCH_INFO),
    clip_ratio_low=st.sampled_from([0.2, 3e-4, 10.0]),
    clip_ratio_high=st.sampled_from([0.28, 4e-4, 5.0]),
    clip_ratio_c=st.sampled_from([3.0, 1.5]),
    tau_neg=st.sampled_from([1.05, 2.0]),
)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=50)
@given(batch=batches(), mode=st.sampled_from(MODES), config=configs)
def test_policy_losses(name, batch, mode, config):
    *arguments, weights = batch
    original, ours = both(f"compute_policy_loss_{name}")
    old, log_prob, advantages, mask = (x.float() for x in arguments)
    # the largest terms of the sum: log_prob itself, or a ratio
    scale = float((advantages * mask).abs().max() * (10 + log_prob.abs().max()) * 4) * mask.numel()
    compare(
        original,
        ours,
        *arguments,
        mode,
        differentiable=[1],
        valid=mask.bool(),
        scale=scale,
        config=config,
        rollout_is_weights=weights,
    )


@settings(max_examples=60)
@given(batch=batches(), mode=st.sampled_from(MODES), info=st.sampled_from(BATCH_INFO))
def test_agg_loss(batch, mode, info):
    _, log_prob, _, mask, _ = batch
    scale = float(log_prob.abs().max()) * mask.numel()
    compare(
        *both("agg_loss"),
        log_prob,
        mask,
        mode,
        differentiable=[0],
        valid=mask.bool(),
        scale=scale,
        **info,
    )


@settings(max_examples=60)
@given(
    batch=batches(),
    cliprange=st.sampled_from([0.5, 0.01, math.inf]),
    mode=st.sampled_from(MODES),
    info=st.sampled_from(BATCH_INFO),
)
def test_compute_value_loss(batch, cliprange, mode, info):
    old, log_prob, returns, mask, _ = batch
    old = (log_prob.float() + returns.float().flip(0)).to(old.dtype)  # some beyond the range
    # at a bound verl has three quarters of the gradient
    assume(not ((log_prob == old + cliprange) | (log_prob == old - cliprange)).any())
    scale = float((log_prob.float() - returns.float()).square().max()) * mask.numel()
    compare(
        *both("compute_value_loss"),
        log_prob,
        returns,
        old,
        mask,
        cliprange,
        mode,
        differentiable=[0],
        valid=mask.bool(),
        scale=scale,
        **info,
    )


@pytest.mark.parametrize(
    "estimator", ["kl", "k1+", "abs", "abs+", "mse", "k2+", "low_var_kl", "k3", "k3+"]
)
@settings(max_examples=20)
@given(batch=batches())
def test_kl_penalty(estimator, batch):
    old, log_prob, *_ = batch
    compare(*both("kl_penalty"), log_prob, old, estimator, differentiable=[0, 1], scale=50.0)


def test_the_registry_holds_ours_while_patched():
    before = core_algos.get_policy_loss_fn("vanilla")
    with library.patch(only=["compute_policy_loss_vanilla"]):
        assert core_algos.get_policy_loss_fn("vanilla") is core_algos.compute_policy_loss_vanilla
        assert core_algos.get_policy_loss_fn("vanilla") is not before
    assert core_algos.get_policy_loss_fn("vanilla") is before


def tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_in_a_masked_slot_stays_there(name):
    _, ours = both(f"compute_policy_loss_{name}")
    old, log_prob, advantages = tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    results = []
    for fill in (0.0, math.nan):
        filled = [torch.where(mask.bool(), x, fill) for x in (old, log_prob, advantages)]
        leaf = filled[1].requires_grad_()
        loss, metrics = ours(filled[0], leaf, filled[2], mask, config=actor_config())
        loss.backward()
        results.append((loss.item(), metrics, leaf.grad))
    assert results[0][:2] == results[1][:2]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_valid_token_a_loss_is_0(mode):
    _, ours = both("compute_policy_loss_vanilla")
    old, log_prob, advantages = tokens(2, 5)
    log_prob.requires_grad_()
    loss, metrics = ours(old, log_prob, advantages, torch.zeros(2, 5), mode, actor_config())
    loss.backward()
    assert loss.item() == 0 and not log_prob.grad.any() and set(metrics.values()) == {0.0}


def left_to_verl(name, *arguments, **keywords):
    """True if the replacement returns what the original does, unchanged."""
    result = object()

    def original(*got, **got_keywords):
        return result

    return wrap(library.replacements[name], original)(*arguments, **keywords) is result


def test_what_is_left_to_verl():
    old, log_prob, advantages = tokens(2, 5)
    mask, vanilla = torch.ones(2, 5), "compute_policy_loss_vanilla"
    arguments = (old, log_prob, advantages, mask, "token-mean")
    assert not left_to_verl(vanilla, *arguments, actor_config())
    assert left_to_verl(vanilla, *arguments, None)
    assert left_to_verl(vanilla, *arguments, {"clip_ratio": 0.2})
    assert left_to_verl(vanilla, *arguments, actor_config(clip_ratio_c=0.5))
    assert left_to_verl(vanilla, *arguments, actor_config(clip_ratio_low=-0.1))
    assert left_to_verl(vanilla, *arguments, actor_config({"dp_size": 2}))
    assert left_to_verl(vanilla, *arguments[:4], "no-mode", actor_config())
    assert left_to_verl(vanilla, old.double(), *arguments[1:], actor_config())
    assert left_to_verl(vanilla, old, log_prob, advantages[:, :1], *arguments[3:], actor_config())
    assert left_to_verl(vanilla, old.requires_grad_(), *arguments[1:], actor_config())
    old = old.detach()
    config = actor_config(dro_beta=None)
    assert left_to_verl("compute_policy_loss_dro", *arguments, config)
    assert left_to_verl("compute_policy_loss_dro", *arguments, actor_config(), mask)
    assert left_to_verl("agg_loss", log_prob, mask, "token-mean", batch_num_tokens=torch.tensor(3))
    assert left_to_verl("agg_loss", log_prob.double(), mask, "token-mean")
    weights = torch.tensor([[1, 0.5, 1, 1, 0], [1, 0.25, 0, 1, 1]])
    for weighing in (weights, (4 * weights).long(), weights.masked_fill(mask == 1, torch.nan)):
        assert left_to_verl("agg_loss", log_prob, weighing, "token-mean")
        assert left_to_verl("compute_value_loss", log_prob, advantages, old, weighing, 0.2)
        for loss in LOSSES:
            name = f"compute_policy_loss_{loss}"
            found = left_to_verl(name, *arguments[:3], weighing, "token-mean", actor_config())
            assert found, name
    assert left_to_verl("kl_penalty", log_prob, old, "full")
    assert left_to_verl("kl_penalty", log_prob, old, "k2")
    assert left_to_verl("kl_penalty", log_prob, old[:, :1], "k3")
    assert left_to_verl("compute_value_loss", log_prob, advantages, old, mask, -1.0)


class Data(dict):
    """A batch of padded tensors."""

    def select(self, *names):
        return self

    to_padded_tensor = select


def test_what_a_step_of_the_actor_calls_by_default_is_served(monkeypatch):
    from verl.workers.utils import losses

    monkeypatch.setattr(losses, "no_padding_2_padding", lambda tensor, data: tensor)
    old, log_prob, advantages = tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    data = Data(
        dp_size=1,
        batch_num_tokens=7,
        global_batch_size=2,
        response_mask=mask,
        old_log_probs=old,
        advantages=advantages,
        ref_log_prob=old + 0.1,
    )
    output = {"log_probs": log_prob.requires_grad_(), "entropy": log_prob.detach().square()}
    with library.patch():
        loss, _ = losses.ppo_loss(actor_config(use_kl_loss=True), output, data)
        loss.backward()
        calls = {name: r.calls for name, r in library.replacements.items()}
    served = {name: found.served for name, found in calls.items() if found.served}
    assert served == {"compute_policy_loss_vanilla": 1, "agg_loss": 2, "kl_penalty": 1}
    assert not any(found.passed_on for found in calls.values())


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_may_be_changed_in_place(name):
    """As verl's ppo_loss does, which subtracts the entropy from it."""
    _, ours = both(f"compute_policy_loss_{name}")
    old, log_prob, advantages = tokens(2, 5)
    gradients = []
    for change in (0.0, 3.0):
        leaf = log_prob.clone().requires_grad_()
        loss, _ = ours(old, leaf, advantages, torch.ones(2, 5), config=actor_config())
        loss -= change * leaf.mean()
        loss.backward()
        gradients.append(leaf.grad + change / leaf.numel())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_the_rows_of_the_engine_have_the_gradient_of_verl(name):
    """Of one micro-batch, with every candidate of Clip-Cov drawn, and without clipping."""
    old, noise, advantages = tokens(4, 60)
    log_prob, mask, bounds = old + 0.3 * noise, torch.ones(4, 60), (0.3, 5.0)
    config = actor_config(clip_ratio_low=1.0, clip_ratio_high=1e9)
    settings = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.3, "clip_cov_ub": 5.0}
    settings |= {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}
    for key, value in settings.items():
        object.__setattr__(config.policy_loss, key, value)
    theirs, ours = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    verl = core_algos.get_policy_loss_fn(name)
    verl(old, theirs, advantages, mask, config=config)[0].backward()

    share = 1.0 if name == "clip_cov" else 0.1
    row = find(name).replace(covariance_share=share, covariance_range=bounds)
    both = torch.stack([log_prob, advantages]).double().flatten(1)
    centred = both - both.mean(1, keepdim=True)
    chosen = choose(row, centred.prod(0), (0, 1, 1)).view(4, 60)
    assert 10 < chosen.sum() < 120
    if name == "clip_cov":
        advantages = advantages.masked_fill(chosen, 0)
    loss = ops.policy_loss(ours, old, advantages, row.objective).loss
    if name == "kl_cov":
        distance = (ours - old).abs().where(chosen, 0)
        loss = loss + row.covariance_kl_coef * ops.aggregate(distance, "token-mean")
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
