"""A rollout and its update against NumPy, from https://arxiv.org/abs/1707.06347."""

import numpy as np
import pytest
import torch

from tests.oracles.gae import gae
from warpo.engine.trainers.control.environments import Environments, spaces_of
from warpo.engine.trainers.control.networks import gaussian
from warpo.engine.trainers.control.ppo import PpoLearner


@pytest.fixture
def learner(config):
    def make(**changes):
        settings = config(**changes)
        torch.manual_seed(0)
        environments = Environments(settings)
        return PpoLearner(settings, spaces_of(settings), environments, torch.device("cpu"))

    return make


def quiet(done, total):
    """No progress is shown."""


WALKS = ("warpo-tests/Walk-v0", "warpo-tests/WalkContinuous-v0")


@pytest.mark.parametrize("environment", WALKS)
def test_advantages_of_a_rollout_are_those_of_the_oracle(learner, environment):
    ppo = learner(environment=environment, num_envs=4, gamma=0.9, ppo={"gae_lambda": 0.8})
    ppo.rollouts.collect(quiet)
    observations, _, logprobs, advantages, returns, values = ppo.rollouts.samples()
    rollout, network = ppo.rollouts.buffer, ppo.network
    assert rollout.terminated.any() and rollout.truncated.any()
    with torch.no_grad():
        after = network.values(torch.from_numpy(rollout.last_observations).flatten(0, 1))
    table, after = values.view(8, 4).double().numpy(), after.view(8, 4).double().numpy()
    for env in range(4):
        expected = gae(
            rollout.rewards[:, env].astype(np.float64),
            table[:, env],
            gamma=0.9,
            gae_lambda=0.8,
            terminated=rollout.terminated[:, env],
            truncated=rollout.truncated[:, env],
            final_values=after[:, env],
            last_values=after[-1, env],
        )
        for mine, theirs in zip((advantages, returns), expected, strict=True):
            np.testing.assert_allclose(mine.view(8, 4)[:, env], theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(observations.view(8, 4, 2), rollout.observations)
    assert (logprobs < 0).all() or environment == WALKS[1]


def test_a_rollout_goes_on_where_the_last_one_ended(learner):
    ppo = learner(num_envs=3)
    for _ in range(3):
        start = ppo.rollouts._environments.observations.copy()
        ppo.rollouts.collect(quiet)
        rollout = ppo.rollouts.buffer
        np.testing.assert_array_equal(rollout.observations[0], start)
        goes_on = ~(rollout.terminated | rollout.truncated)[:-1]
        np.testing.assert_array_equal(
            rollout.observations[1:][goes_on], rollout.last_observations[:-1][goes_on]
        )
        rewards = rollout.last_observations.sum(-1) + rollout.actions + 1
        np.testing.assert_allclose(rollout.rewards, rewards, rtol=1e-6)


def test_unbounded_actions_are_taken_as_drawn_and_bounded_ones_are_clipped(learner):
    far = np.float32([[-9, -9], [9, 9]])
    unbounded = learner(environment="warpo-tests/WalkUnbounded-v0")
    np.testing.assert_array_equal(unbounded.rollouts.to_environment(far), far)
    bounded = learner(environment=WALKS[1])
    np.testing.assert_array_equal(
        bounded.rollouts.to_environment(far), np.float32([[-1, 0], [3, 0.5]])
    )


@pytest.mark.parametrize("environment", WALKS)
@pytest.mark.parametrize("clip", ["none", 0.05])
def test_an_optimizer_step_takes_the_gradient_of_equation_9(learner, environment, clip):
    """Clipped surrogate, value loss and entropy in plain float64."""
    options = {
        "entropy_coef": 0.03,
        "value_coef": 0.7,
        "value_clip_range": clip,
        "max_grad_norm": 1e9,
        "clip_range": 0.1,
    }
    ppo = learner(environment=environment, num_envs=4, ppo=options)
    ppo.rollouts.collect(quiet)
    samples = ppo.rollouts.samples()
    observations, actions, old_logprobs, advantages, returns, old_values = samples
    with torch.no_grad():
        for parameter in ppo.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    network = ppo.network.double()
    heads = network.stack(observations.double())
    values = heads[1, :, 0]
    if actions.is_floating_point():
        logprobs, entropy = gaussian(heads[0], network.log_std, actions.double())
    else:
        table = heads[0].log_softmax(1)
        logprobs = table.gather(1, actions[:, None])[:, 0]
        entropy = -(table.exp() * table).sum(1)
    ratio = (logprobs - old_logprobs).exp()
    scaled = (advantages - advantages.mean()) / advantages.std()
    surrogate = torch.minimum(ratio * scaled, ratio.clamp(0.9, 1.1) * scaled)
    errors = (values - returns).square() / 2
    if clip != "none":
        near = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square() / 2)
    loss = (-surrogate + 0.7 * errors - 0.03 * entropy).mean()
    assert ((ratio < 0.9) | (ratio > 1.1)).any()
    names, parameters = zip(*network.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    network.float()
    _, _, norm = ppo._optimizer_step(*samples)
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(
            parameter.grad.double(),
            gradient,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, n=name: f"{n} {m}",
        )
    total = torch.stack([gradient.norm() for gradient in expected]).norm()
    torch.testing.assert_close(norm.double(), total, rtol=1e-3, atol=1e-5)


def test_the_first_update_has_ratio_one_and_metrics_are_means(learner):
    ppo = learner(ppo={"epochs": 1, "minibatch_size": 16})
    taken, metrics = ppo.iterate(0, quiet)
    assert taken == 16
    assert metrics["kl/mean"] == pytest.approx(0, abs=1e-9) and metrics["ratio/clip_frac"] == 0
    assert metrics["loss/policy"] == pytest.approx(0, abs=1e-6)  # advantages have mean 0
    assert 0 < metrics["entropy/mean"] <= np.log(3) + 1e-6 and metrics["grad_norm"] > 0


def test_each_epoch_takes_every_step_once(learner):
    ppo = learner(ppo={"epochs": 3, "minibatch_size": 4})
    seen = []

    def step(*samples):
        seen.append(samples[0])
        return torch.zeros(16), torch.zeros(7), torch.zeros(())

    ppo._optimizer_step = step
    ppo.rollouts.collect(quiet)
    samples = ppo.rollouts.samples()
    ppo._update(samples)
    assert len(seen) == 12
    for epoch in range(3):
        rows = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, samples[0].tolist()))
