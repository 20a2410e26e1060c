"""An update of SAC with a value function against NumPy, from https://arxiv.org/abs/1801.01290."""

import numpy as np
import pytest
import torch

from tests.engine.trainers.control.test_sac import forward, q_values, sample
from warpo.engine.trainers.control.environments import Environments, spaces_of
from warpo.engine.trainers.control.sac_v import SacVLearner


@pytest.fixture
def learner(config):
    settings = config("sac_v", lr=1e-3, sac={"polyak": 0.1, "temperature": 0.3})
    torch.manual_seed(0)
    device = torch.device("cpu")
    learner = SacVLearner(settings, spaces_of(settings), Environments(settings), device)
    with torch.no_grad():
        for parameter in learner.target_v.parameters():
            parameter.add_(0.5)  # a target apart from V
    return learner


def values(network, observations):
    return forward(network.stack, 0, observations.double().numpy())[:, 0]


def test_the_losses_are_those_of_the_paper(learner, steps):
    torch.manual_seed(2)
    noise_v, noise_policy = torch.randn(8, 2), torch.randn(8, 2)
    actions, logprobs = sample(learner.policy, steps.observations, noise_v)
    v_targets = q_values(learner.q, steps.observations, actions).min(0) - 0.3 * logprobs
    v_loss = ((values(learner.v, steps.observations) - v_targets) ** 2).mean() / 2
    after = values(learner.target_v, steps.next_observations)
    targets = steps.rewards.numpy() + 0.99 * np.where(steps.terminated, 0, after)
    q = q_values(learner.q, steps.observations, steps.actions.double().numpy())
    q_loss = sum(((one - targets) ** 2).mean() / 2 for one in q)
    actions, logprobs = sample(learner.policy, steps.observations, noise_policy)

    torch.manual_seed(2)
    metrics = learner.update(steps).tolist()
    learned = q_values(learner.q, steps.observations, actions).min(0)
    policy_loss = (0.3 * logprobs - learned).mean()
    expected = [q_loss, policy_loss, -logprobs.mean(), q.mean(), 0.3, v_loss]
    np.testing.assert_allclose(metrics, expected, rtol=2e-5, atol=1e-6)
    assert len(metrics) == len(learner.metrics)


def test_the_target_is_a_polyak_average_of_the_updated_v(learner, steps):
    before = [p.detach().clone() for p in learner.target_v.parameters()]
    start = [p.detach().clone() for p in learner.v.parameters()]
    learner.update(steps)
    trained = list(learner.v.parameters())
    assert all((new != old).any() for new, old in zip(trained, start, strict=True))
    for old, new, v in zip(before, learner.target_v.parameters(), trained, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * v)
        assert not new.requires_grad


def test_v_learns_from_q_and_policy_and_leaves_them_alone(learner, steps):
    learner._update_v(steps.observations, torch.tensor(0.3))
    assert all(p.grad is None for p in [*learner.q.parameters(), *learner.policy.parameters()])
    assert all(p.grad is not None for p in learner.v.parameters())
