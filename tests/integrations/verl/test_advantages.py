import uuid

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("verl", reason="verl is not installed: make peers; then make test-integrations")
from omegaconf import OmegaConf  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils import torch_functional  # noqa: E402

from warpo.kernels.integrations import verl  # noqa: E402

NUMBERS = st.sampled_from([torch.int64, torch.float32])
MASKS = st.sampled_from([torch.int64, torch.bool, torch.float32, torch.uint8])
SIZES = st.integers(1, 5)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
LAYOUTS = st.sampled_from(["dense", "sliced", "transposed"])


def both(name: str, module=core_algos):
    """verl's function and what the patch puts in its place."""
    original = getattr(module, name)
    with verl.patch(only=[name]):
        return original, getattr(module, name)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    return x


@st.composite
def tokens(draw, masks=NUMBERS):
    """Rewards, values and a mask of responses with observations inside; two valid ones at least."""
    rows, steps = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = torch.randint(0, steps + 1, (rows, 1), generator=generator)
    mask = torch.arange(steps) < lengths
    mask &= torch.rand((rows, steps), generator=generator) < draw(st.sampled_from([1.0, 0.6]))
    mask[0, :2] = True
    dtype, layout = draw(FLOATS), draw(LAYOUTS)
    rewards, values = torch.randn((2, rows, steps), generator=generator).to(dtype)
    mask = laid_out(mask.to(draw(masks)), draw(LAYOUTS))
    return laid_out(rewards, layout), laid_out(values, draw(LAYOUTS)), mask


@st.composite
def completions(draw, sizes=SIZES):
    """Rewards and mask of completions, and the names of their prompts in verl's array."""
    counts = draw(st.lists(sizes, min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    prompts = np.repeat(np.arange(len(counts)), counts)
    if draw(st.booleans()):
        prompts = prompts[torch.randperm(len(prompts), generator=generator).numpy()]
    names = [str(uuid.UUID(int=7919 * int(p) + (1 << 100))) for p in prompts]
    index = draw(
        st.sampled_from([np.array(names, dtype=object), np.array(names), prompts.astype(np.int64)])
    )
    shape = (len(prompts), draw(st.integers(1, 9)))
    rewards = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        rewards = (rewards > 0).float()
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[:, 0] = True
    return rewards.to(draw(FLOATS)), mask.to(draw(MASKS)), index


@settings(max_examples=40)
@given(tokens(), st.sampled_from([1.0, 0.9, 0]), st.sampled_from([1.0, 0.95]))
def test_gae(case, gamma, lam):
    original, ours = both("compute_gae_advantage_return")
    compare(original, ours, *case, gamma, lam, scale=10.0)


@settings(max_examples=40)
@given(tokens(), st.sampled_from([1.0, 0.9]))
def test_reinforce_plus_plus(case, gamma):
    rewards, _, mask = case
    original, ours = both("compute_reinforce_plus_plus_outcome_advantage")
    config = OmegaConf.create({"gamma": gamma})
    compare(original, ours, rewards, mask, config=config, index=None, scale=10.0)


@settings(max_examples=40)
@given(tokens(MASKS), st.booleans(), st.floats(-3, 3))
def test_masked_whiten(case, shift_mean, offset):
    values, _, mask = case
    original, ours = both("masked_whiten", torch_functional)
    compare(original, ours, values + offset, mask, shift_mean, scale=10.0)
    compare(original, ours, values[0] + offset, mask[0], shift_mean=shift_mean, scale=10.0)


GROUPS = [
    "compute_grpo_outcome_advantage",
    "compute_grpo_vectorized_outcome_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_opo_outcome_advantage",
    "compute_gpg_outcome_advantage",
]


@pytest.mark.parametrize("name", GROUPS)
@settings(max_examples=40)
@given(case=completions(), epsilon=st.sampled_from([1e-6, 1e-3]), by_std=st.booleans())
def test_groups(name, case, epsilon, by_std):
    original, ours = both(name)
    options = {"epsilon": epsilon, "config": OmegaConf.create({})}
    if "grpo" in name:
        options["norm_adv_by_std_in_grpo"] = by_std
    if name == "compute_gpg_outcome_advantage":
        options["f_norm"] = 2.0
    if "baseline" in name and int(case[1].sum()) < 2:
        return
    compare(original, ours, *case, **options, scale=10.0)


@settings(max_examples=40)
@given(completions(sizes=st.integers(2, 5)))
def test_gdpo_runs_on_what_is_replaced(case):
    rewards, mask, index = case
    original = core_algos.compute_gdpo_outcome_advantage

    def ours(*args, **kwargs):
        with verl.patch():
            return original(*args, **kwargs)

    compare(original, ours, rewards.float(), mask, index, scale=10.0)


@pytest.mark.parametrize("name", [*GROUPS[2:3], "compute_gae_advantage_return"])
def test_fewer_than_two_valid_tokens_are_refused_as_in_verl(name):
    rewards, mask = torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    arguments = (rewards, mask, np.zeros(3, dtype=np.int64))
    if "gae" in name:
        arguments = (rewards, rewards, mask, 1.0, 1.0)
    original, ours = both(name)
    for count in (0, 1):
        mask[0, :count] = 1
        with pytest.raises(ValueError) as wanted:
            original(*arguments)
        with pytest.raises(ValueError) as found:
            ours(*arguments)
        assert str(found.value) == str(wanted.value)


def test_nan_in_a_masked_slot_stays_there():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn((2, 3, 8), generator=generator)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [2]])).long()
    mask[0, 3] = 0
    holes = mask == 0
    poisoned = [x.masked_fill(holes, torch.nan) for x in (rewards, values)]
    with verl.patch():
        clean = core_algos.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
        found = core_algos.compute_gae_advantage_return(*poisoned, mask, 0.9, 0.8)
        assert torch.equal(found[0], clean[0])
        assert torch.equal(found[1][~holes], clean[1][~holes])
        config = OmegaConf.create({"gamma": 0.9})
        plus_plus = core_algos.get_adv_estimator_fn("reinforce_plus_plus")
        for a, b in zip(
            plus_plus(poisoned[0], mask, config), plus_plus(rewards, mask, config), strict=True
        ):
            assert torch.equal(a, b)
        whitened = torch_functional.masked_whiten(poisoned[0], mask)
        assert torch.equal(whitened.isnan(), holes)
    assert core_algos.compute_gae_advantage_return(*poisoned, mask, 0.9, 0.8)[0].isnan().any()


def test_equal_rewards_teach_nothing():
    # 0.1 summed seven times and divided by seven is not 0.1
    rewards, mask = torch.full((7, 1), 0.1), torch.ones(7, 1)
    with verl.patch():
        advantages, _ = core_algos.compute_grpo_outcome_advantage(
            rewards, mask, np.zeros(7, dtype=np.int64)
        )
    assert (advantages == 0).all()


def test_by_name_and_by_registry():
    names = core_algos.ADV_ESTIMATOR_REGISTRY
    before = dict(names)
    with verl.patch():
        for name, function in before.items():
            ours = core_algos.get_adv_estimator_fn(name)
            assert ours is getattr(core_algos, function.__name__)
            assert (ours is function) == (function.__name__ not in verl.patched())
        estimator = core_algos.get_adv_estimator_fn(core_algos.AdvantageEstimator.RLOO)
        assert estimator is not before["rloo"]
    assert names == before


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("compute_grpo_outcome_advantage", (torch.ones(2, 3).double(), torch.ones(2, 3), [0, 0])),
        ("compute_grpo_outcome_advantage", (torch.ones(2, 3), torch.ones(2, 3), [0, 0])),
        (
            "compute_grpo_vectorized_outcome_advantage",
            (torch.ones(2, 3), torch.ones(2, 3), np.array(["1", "01"])),
        ),
        (
            "compute_rloo_vectorized_outcome_advantage",
            (torch.ones(2, 3).bfloat16(), torch.ones(2, 3), np.array([0, 0])),
        ),
        (
            "compute_gae_advantage_return",
            (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.9), 1.0),
        ),
        (
            "compute_gae_advantage_return",
            (*[torch.rand(2, 3).double()] * 2, torch.ones(2, 3), 1, 1),
        ),
        (
            "compute_gae_advantage_return",
            (torch.rand(2, 3), torch.rand(2, 3), torch.tensor([[1, 0.5, 1], [1, 0.25, 0]]), 1, 1),
        ),
    ],
)
def test_the_rest_is_passed_on(name, arguments):
    original, ours = both(name)
    for found, wanted in zip(ours(*arguments), original(*arguments), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_whitening_with_gradients_is_passed_on():
    original, ours = both("masked_whiten", torch_functional)
    values = torch.randn(3, 4)
    compare(original, ours, values, torch.ones(3, 4), differentiable=[0])
