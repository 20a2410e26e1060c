"""An update of SAC against NumPy, written from https://arxiv.org/abs/1812.05905."""

import numpy as np
import pytest
import torch

from tests.oracles.soft_q_targets import soft_q_targets
from warpo.engine.trainers.control.environments import Environments, spaces_of
from warpo.engine.trainers.control.sac import SacLearner
from warpo.engine.trainers.control.soft import polyak_


@pytest.fixture
def learner(config):
    def make(**changes):
        settings = config("sac", lr=1e-3, sac={"polyak": 0.1, **changes})
        torch.manual_seed(0)
        device = torch.device("cpu")
        return SacLearner(settings, spaces_of(settings), Environments(settings), device)

    return make


def forward(stack, index, x):
    """A network in float64."""
    last = len(stack.weights) - 1
    for number, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        x = x @ weight[index].detach().double().numpy() + bias[index].detach().double().numpy()
        x = np.maximum(x, 0) if number < last else x
    return x


def q_values(q, observations, actions):
    x = np.concatenate([observations.double().numpy(), actions], 1)
    return np.stack([forward(q.stack, index, x)[:, 0] for index in range(2)])


def sample(policy, observations, noise):
    """Appendix C of the paper, without its stable form of log(1 - tanh^2)."""
    mean, log_std = np.split(forward(policy.stack, 0, observations.double().numpy()), 2, axis=1)
    std, noise = np.exp(log_std), noise.double().numpy()
    before = mean + std * noise
    density = np.exp(-(noise**2) / 2) / (std * np.sqrt(2 * np.pi))
    logprobs = np.log(density).sum(1) - np.log(1 - np.tanh(before) ** 2).sum(1)
    return np.tanh(before), logprobs


@pytest.mark.parametrize("temperature", ["learned", 0.3])
def test_the_losses_are_those_of_the_paper(learner, steps, temperature):
    sac = learner(temperature=temperature)
    polyak_(sac.target_q, TwinOther(sac.q), 0.5)  # a target apart from Q
    alpha = 1.0 if temperature == "learned" else 0.3
    torch.manual_seed(2)
    noise_after, noise = torch.randn(8, 2), torch.randn(8, 2)
    next_actions, next_logprobs = sample(sac.policy, steps.next_observations, noise_after)
    next_q = q_values(sac.target_q, steps.next_observations, next_actions)
    targets = soft_q_targets(
        steps.rewards.double().numpy(),
        steps.terminated.numpy(),
        *next_q,
        next_logprobs,
        alpha=alpha,
        gamma=0.99,
    )
    q = q_values(sac.q, steps.observations, steps.actions.double().numpy())
    q_loss = sum(((one - targets) ** 2).mean() / 2 for one in q)
    actions, logprobs = sample(sac.policy, steps.observations, noise)

    torch.manual_seed(2)
    metrics = sac.update(steps).tolist()
    # the policy learns from the Q-functions after their update
    after = q_values(sac.q, steps.observations, actions).min(0)
    policy_loss = (alpha * logprobs - after).mean()
    np.testing.assert_allclose(
        metrics, [q_loss, policy_loss, -logprobs.mean(), q.mean(), alpha], rtol=2e-5, atol=1e-6
    )


class TwinOther(torch.nn.Module):
    """The parameters of a network, each plus one."""

    def __init__(self, network):
        super().__init__()
        self.values = torch.nn.ParameterList([p.detach() + 1 for p in network.parameters()])


def test_the_target_is_a_polyak_average_of_the_updated_q(learner, steps):
    sac = learner()
    before = [p.detach().double().numpy() for p in sac.target_q.parameters()]
    sac.update(steps)
    assert any((p.grad != 0).any() for p in sac.q.parameters())
    for old, new, q in zip(before, sac.target_q.parameters(), sac.q.parameters(), strict=True):
        expected = 0.9 * old + 0.1 * q.detach().double().numpy()
        np.testing.assert_allclose(new.detach(), expected, rtol=1e-6, atol=1e-7)
        assert not new.requires_grad


def test_the_policy_gradient_leaves_the_q_functions_alone(learner, steps):
    sac = learner()
    sac._update_q(steps, torch.tensor(1.0))
    before = [p.grad.clone() for p in sac.q.parameters()]
    sac._update_policy(steps.observations, torch.tensor(1.0))
    for gradient, parameter in zip(before, sac.q.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)
    assert all(p.grad is not None for p in sac.policy.parameters())


@pytest.mark.parametrize(("target", "aimed_at"), [("auto", -2.0), (0.5, 0.5)])
def test_the_temperature_follows_the_gradient_of_its_loss_by_adam(learner, target, aimed_at):
    sac = learner(target_entropy=target)
    logprobs = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 7.0]), torch.tensor([-3.0, -8.0])]
    # d/d log(alpha) of -log(alpha) (mean of logprobs + target); Adam: arXiv 1412.6980 algorithm 1
    log_alpha = mean = square = 0.0
    for t, batch in enumerate(logprobs, start=1):
        gradient = -(batch.mean().item() + aimed_at)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = 1e-3 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        log_alpha -= rate * mean / (np.sqrt(square) + 1e-8)
        sac.temperature.update(batch)
        assert sac.temperature.value.item() == pytest.approx(np.exp(log_alpha), rel=1e-6)


def test_a_fixed_temperature_stays(learner, steps):
    sac = learner(temperature=0.3)
    sac.update(steps)
    assert sac.temperature.value.item() == pytest.approx(0.3) and sac.temperature.stateful == {}


def test_actions_reach_the_bounds_of_the_environment_and_no_further(learner):
    sac = learner()
    squashed = np.float32([[-1, -1], [1, 1], [0, 0]])
    np.testing.assert_allclose(sac._to_environment(squashed), [[-1, 0], [3, 0.5], [1, 0.25]])
    assert (sac._to_environment(1.001 * squashed) <= sac._spaces.high).all()


def test_what_the_buffer_keeps_is_what_happened(learner):
    sac = learner()
    seen = []
    for explore in (True, True, False, False, False):
        observations = sac._environments.observations.copy()
        sac._step(explore)
        seen.append(observations)
    rows = sac._buffer._rows[:10]
    np.testing.assert_array_equal(rows[:, :2], np.concatenate(seen))
    assert (rows[:, 2:4].abs() <= 1).all()
    taken = sac._to_environment(rows[:, 2:4].numpy())
    np.testing.assert_allclose(rows[:, 6], rows[:, 4:6].numpy().sum(1) + taken.sum(1), rtol=1e-5)
    # the last observation of an episode, not the first of the next
    np.testing.assert_array_equal(rows[:, 4], rows[:, 0] + 1)
    np.testing.assert_array_equal(rows[:, 7].bool(), (rows[:, 4] == 3) & (rows[:, 1] < 0.5))
