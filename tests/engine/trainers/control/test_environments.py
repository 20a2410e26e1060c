import numpy as np
import pytest

from warpo.engine.errors import CheckpointError
from warpo.engine.trainers.control.environments import Environments, evaluate, make, spaces_of


def actions_of(config, steps, seed=0):
    draws = np.random.default_rng(seed)
    return draws.integers(1, 4, (steps, config.num_envs))


def test_an_episode_ends_with_its_own_last_observation_and_the_next_begins_at_once(config):
    settings = config(num_envs=4)
    environments = Environments(settings)
    ended = set()
    for actions in actions_of(settings, 20):
        before = environments.observations.copy()
        rewards, terminated, truncated, last = environments.step(actions)
        np.testing.assert_array_equal(last[:, 0], before[:, 0] + 1)
        np.testing.assert_array_equal(last[:, 1], before[:, 1])
        np.testing.assert_allclose(rewards, last.sum(1) + actions, rtol=1e-6)
        np.testing.assert_array_equal(terminated, (before[:, 1] < 0.5) & (before[:, 0] == 2))
        np.testing.assert_array_equal(truncated, before[:, 0] == 4)
        over = terminated | truncated
        np.testing.assert_array_equal(environments.observations[~over], last[~over])
        assert (environments.observations[over, 0] == 0).all()
        assert (environments.observations[over, 1] != last[over, 1]).all()
        ended |= {*terminated[over].tolist()}
    assert ended == {True, False}


def test_finished_episodes_are_reported_once_with_return_and_length(config):
    settings = config(num_envs=1)
    environments = Environments(settings)
    total, lengths, returns = 0.0, [], []
    for actions in actions_of(settings, 20):
        rewards, terminated, truncated, last = environments.step(actions)
        total += float(rewards[0])
        if terminated[0] or truncated[0]:
            lengths.append(int(last[0, 0]))
            returns.append(total)
            total = 0.0
    finished = environments.take_finished()
    assert [length for _, length in finished] == lengths
    assert [value for value, _ in finished] == pytest.approx(returns)
    assert environments.take_finished() == []


@pytest.mark.parametrize("name", ["warpo-tests/Walk-v0", "CartPole-v1", "Pendulum-v1"])
def test_a_saved_state_goes_on_bit_for_bit(config, name):
    settings = config(environment=name, num_envs=3)
    draw = make(name).action_space
    draw.seed(1)
    actions = [np.stack([draw.sample() for _ in range(3)]) for _ in range(60)]
    whole, resumed = Environments(settings), Environments(settings)
    for step in actions[:37]:
        whole.step(step)
    whole.take_finished()
    resumed.load_state_dict(whole.state_dict())
    for step in actions[37:]:
        for mine, other in zip(whole.step(step), resumed.step(step), strict=True):
            np.testing.assert_array_equal(mine, other)
    assert whole.take_finished() == resumed.take_finished()
    assert whole.state_dict() == resumed.state_dict()


def test_a_state_of_other_environments_is_refused(config):
    settings = config()
    state = Environments(settings).state_dict()
    with pytest.raises(CheckpointError, match="num_envs = 2, and goes on with .*, 1"):
        Environments(config(num_envs=1)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="'warpo-tests/Walk-v0'.* goes on with 'CartPole-v1'"):
        Environments(config(environment="CartPole-v1")).load_state_dict(state)


def test_an_environment_that_its_seed_does_not_fix_cannot_be_resumed(config):
    settings = config(environment="warpo-tests/WalkRandom-v0")
    state = Environments(settings).state_dict()
    with pytest.raises(CheckpointError, match="does not come to the same state by the same seed"):
        Environments(settings).load_state_dict(state)


def test_environments_and_seeds_have_different_episodes(config):
    first, second = (Environments(config(num_envs=3, seed=seed)).observations for seed in (0, 1))
    starts = np.concatenate([first, second])[:, 1]
    assert len(set(starts.tolist())) == 6


def test_spaces(config):
    discrete = spaces_of(config())
    assert (discrete.observation, discrete.action, discrete.first) == (2, 3, 1)
    continuous = spaces_of(config("sac"))
    assert (continuous.actions, continuous.action) == ("continuous", 2)
    np.testing.assert_array_equal(continuous.low, np.float32([-1, 0]))
    np.testing.assert_array_equal(continuous.high, np.float32([3, 0.5]))
    # observations that are no vector become one
    assert spaces_of(config(environment="warpo-tests/Grid-v0")).observation == 4


def test_an_evaluation_is_the_same_whenever_it_is_made(config):
    name = config().environment

    def one(observation):
        return np.int64(1)

    first = evaluate(one, name, episodes=6, seed=0)
    assert first == evaluate(one, name, episodes=6, seed=0)
    assert len(first) == len(set(first)) == 6
    assert first != evaluate(one, name, episodes=6, seed=1)
