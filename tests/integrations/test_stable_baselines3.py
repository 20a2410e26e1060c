import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip(
    "stable_baselines3",
    reason="Stable-Baselines3 is not installed: make peers; then make test-integrations",
)
from gymnasium import spaces  # noqa: E402
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer  # noqa: E402

from warpo.kernels.integrations import stable_baselines3  # noqa: E402
from warpo.kernels.integrations.patching import wrap  # noqa: E402

BOX = spaces.Box(-1, 1, (2,))


def buffer(steps=7, envs=3, gamma=0.99, gae_lambda=0.95, seed=0, kind=RolloutBuffer):
    space = spaces.Dict({"obs": BOX}) if kind is DictRolloutBuffer else BOX
    made = kind(steps, space, BOX, "cpu", gae_lambda, gamma, envs)
    rng = np.random.default_rng(seed)
    made.rewards[:], made.values[:] = rng.normal(size=(2, steps, envs))
    made.episode_starts[:] = rng.random((steps, envs)) < 0.2
    return made, torch.as_tensor(rng.normal(size=envs)).float(), rng.random(envs) < 0.5


def compute(*args, patched, **options):
    made, last_values, dones = buffer(*args, **options)
    if patched:
        with stable_baselines3.patch():
            made.compute_returns_and_advantage(last_values, dones)
    else:
        made.compute_returns_and_advantage(last_values, dones)
    return made


@given(
    steps=st.integers(1, 70),
    envs=st.sampled_from([1, 3, 40]),
    gamma=st.sampled_from([0.99, 1.0, 0.0]),
    gae_lambda=st.sampled_from([0.95, 1.0, 0.0]),
    seed=st.integers(0, 999),
    kind=st.sampled_from([RolloutBuffer, DictRolloutBuffer]),
)
def test_rollout_buffer(**options):
    wanted, found = compute(patched=False, **options), compute(patched=True, **options)
    for name in ("advantages", "returns"):
        theirs, ours = getattr(wanted, name), getattr(found, name)
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in ("rewards", "values", "episode_starts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_advantages_are_written_in_place():
    made, last_values, dones = buffer()
    view = made.advantages[2:]
    with stable_baselines3.patch():
        made.compute_returns_and_advantage(last_values, dones)
    assert np.shares_memory(view, made.advantages) and view.any()


def test_last_values_may_be_a_column():
    made, last_values, dones = buffer()
    made.compute_returns_and_advantage(last_values, dones)
    wanted = made.advantages.copy()
    with stable_baselines3.patch():
        made.compute_returns_and_advantage(last_values[:, None], dones)
    np.testing.assert_allclose(made.advantages, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": np.zeros((7, 3))},
        {"values": np.zeros((6, 3), np.float32)},
        {"gamma": 1.5},
        {"episode_starts": np.full((7, 3), 0.5, np.float32)},
        {"advantages": np.broadcast_to(np.zeros(3, np.float32), (7, 3))},
    ],
)
def test_what_is_not_served_goes_to_the_library_as_it_came(changes):
    made, last_values, dones = buffer()
    for name, value in changes.items():
        setattr(made, name, value)
    passed = []
    (replacement,) = stable_baselines3.library.replacements.values()
    wrap(replacement, lambda *args: passed.append(args))(made, last_values, dones)
    assert passed[0][0] is made and passed[0][1] is last_values and passed[0][2] is dones


def test_a_value_behind_the_end_of_an_episode_is_not_read():
    """Differs: NaN times 0 is NaN in Stable-Baselines3."""
    made, last_values, dones = buffer()
    made.episode_starts[4] = 1
    with stable_baselines3.patch():
        made.compute_returns_and_advantage(last_values, dones)
        wanted = made.advantages[:4].copy()
        made.values[4:] = np.nan
        made.compute_returns_and_advantage(last_values, dones)
    np.testing.assert_array_equal(made.advantages[:4], wanted)


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
def test_learning_is_the_same(algorithm):
    import stable_baselines3 as library

    found = []
    for patched in (False, True):
        model = getattr(library, algorithm)("MlpPolicy", "CartPole-v1", n_steps=32, seed=0)
        if patched:
            with stable_baselines3.patch():
                model.learn(128)
        else:
            model.learn(128)
        found.append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
