"""An update of discrete SAC against NumPy, and soft policy iteration with its functions, written
from https://arxiv.org/abs/1910.07207.
"""

import numpy as np
import pytest
import torch

from tests.oracles import soft_policy_iteration as oracle
from warpo.engine.trainers.control.environments import Environments, spaces_of
from warpo.engine.trainers.control.replay import Steps
from warpo.engine.trainers.control.sac_discrete import SacDiscreteLearner
from warpo.engine.trainers.control.soft import target_entropy

STATES, ACTIONS = 5, 3  # of the tabular process; the worlds have as many actions


@pytest.fixture
def learner(config):
    def make(**changes):
        settings = config("sac_discrete", lr=1e-3, sac={"polyak": 0.1, **changes})
        torch.manual_seed(0)
        device = torch.device("cpu")
        return SacDiscreteLearner(settings, spaces_of(settings), Environments(settings), device)

    return make


@pytest.fixture
def steps():
    torch.manual_seed(1)
    return Steps(
        torch.randn(8, 2),
        torch.randint(ACTIONS, (8, 1)).float(),
        torch.randn(8, 2),
        torch.randn(8),
        torch.tensor([True] + [False] * 7),
    )


def outputs(stack, index, x):
    """A network in float64."""
    last, x = len(stack.weights) - 1, x.double().numpy()
    for number, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        x = x @ weight[index].detach().double().numpy() + bias[index].detach().double().numpy()
        x = np.maximum(x, 0) if number < last else x
    return x


def smaller(stack, x):
    return np.minimum(outputs(stack, 0, x), outputs(stack, 1, x))


def probabilities(policy, x):
    return oracle.improve(outputs(policy, 0, x), 1.0)


@pytest.mark.parametrize("temperature", ["learned", 0.3])
def test_the_losses_are_those_of_the_paper(learner, steps, temperature):
    sac = learner(temperature=temperature)
    with torch.no_grad():
        for parameter in sac.target_q.parameters():
            parameter.add_(0.5)  # a target apart from Q
    alpha = 1.0 if temperature == "learned" else 0.3
    after = probabilities(sac.policy, steps.next_observations)
    values = oracle.state_values(smaller(sac.target_q, steps.next_observations), after, alpha)
    targets = steps.rewards.numpy() + 0.99 * np.where(steps.terminated, 0, values)
    chosen = (np.arange(8), steps.actions[:, 0].long().numpy())
    q = np.stack([outputs(sac.q, index, steps.observations)[chosen] for index in range(2)])
    q_loss = sum(((one - targets) ** 2).mean() / 2 for one in q)
    policy = probabilities(sac.policy, steps.observations)
    entropy = -(policy * np.log(policy)).sum(1)

    metrics = sac.update(steps).tolist()
    # the policy learns from the Q-functions after their update
    learned = smaller(sac.q, steps.observations)
    policy_loss = -oracle.state_values(learned, policy, alpha).mean()
    np.testing.assert_allclose(
        metrics, [q_loss, policy_loss, entropy.mean(), q.mean(), alpha], rtol=2e-5, atol=1e-6
    )


def test_the_target_is_a_polyak_average_and_the_policy_leaves_the_q_functions_alone(learner, steps):
    sac = learner()
    before = [p.detach().clone() for p in sac.target_q.parameters()]
    sac.update(steps)
    gradients = [p.grad.clone() for p in sac.q.parameters()]
    for old, new, q in zip(before, sac.target_q.parameters(), sac.q.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * q)
    sac._update_policy(steps.observations, torch.tensor(1.0))
    for gradient, parameter in zip(gradients, sac.q.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_the_temperature_falls_where_the_entropy_is_above_its_target(learner):
    sac = learner(target_entropy=0.5)
    for entropy, sign in ((0.9, -1), (0.1, 1)):
        before = sac.temperature.value.item()
        sac.temperature._optimizer.state.clear()  # of Adam, whose mean remembers
        sac.temperature.update(torch.tensor([-entropy, -entropy]))
        assert np.sign(sac.temperature.value.item() - before) == sign
    auto = learner()
    assert target_entropy(auto._config, auto._spaces) == pytest.approx(0.98 * np.log(ACTIONS))


def test_actions_have_the_frequencies_of_the_softmax(learner):
    sac = learner()
    with torch.no_grad():
        sac.policy.weights[-1].mul_(5)
    x = np.float32([[0.4, -0.3]])
    expected = probabilities(sac.policy, torch.from_numpy(x))[0]
    torch.manual_seed(0)
    drawn = sac._actions(np.repeat(x, 40_000, 0), sac._noise(40_000))[:, 0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 40_000, expected, atol=0.01)
    assert expected.max() - expected.min() > 0.1
    assert sac.act(x[0]) == expected.argmax() + 1  # the first action of the world is 1


def test_what_the_buffer_keeps_is_what_happened(learner):
    sac = learner()
    for explore in (True, True, False, False, False):
        sac._step(explore)
    rows = sac._buffer._rows[:10]
    assert set(rows[:, 2].tolist()) <= {0.0, 1.0, 2.0}
    rewards = rows[:, 3:5].sum(1) + rows[:, 2] + 1
    torch.testing.assert_close(rows[:, 5], rewards)


@pytest.fixture
def tabular(config):
    """A learner whose networks are tables over one-hot states, and a process to be solved."""
    random = np.random.default_rng(0)
    rewards = random.normal(size=(STATES, ACTIONS))
    transitions = random.integers(STATES, size=(STATES, ACTIONS))  # the state after
    settings = config(
        "sac_discrete",
        gamma=0.8,
        sac={"hidden_size": STATES, "hidden_layers": 1, "temperature": 0.7, "polyak": 1.0},
    )
    spaces = spaces_of(settings)
    object.__setattr__(spaces, "observation", STATES)
    sac = SacDiscreteLearner(settings, spaces, Environments(settings), torch.device("cpu"))
    for stack in (sac.policy, sac.q, sac.target_q):
        with torch.no_grad():
            stack.weights[0].copy_(torch.eye(STATES))
            for bias in stack.biases:
                bias.zero_()
    states = torch.eye(STATES)
    every = Steps(
        states.repeat_interleave(ACTIONS, 0),
        torch.arange(ACTIONS).repeat(STATES)[:, None],
        states[transitions.reshape(-1)],
        torch.tensor(rewards.reshape(-1), dtype=torch.float32),
        torch.zeros(STATES * ACTIONS, dtype=torch.bool),
    )
    return sac, every, rewards, np.eye(STATES)[transitions]


def write(stack, values):
    """Set the table of a network, (S, A)."""
    with torch.no_grad():
        stack.weights[1].copy_(torch.as_tensor(values).expand_as(stack.weights[1]))


def test_soft_policy_iteration_converges_as_lemma_1_and_theorem_1_say(tabular):
    """Evaluation is the learner's targets until they stand still, improvement the minimum of its
    policy loss.
    """
    sac, every, rewards, transitions = tabular
    alpha, gamma = torch.tensor(0.7), 0.8
    process = {"alpha": 0.7, "gamma": gamma}
    write(sac.policy, np.zeros((STATES, ACTIONS)))
    q, policy = np.zeros((STATES, ACTIONS)), np.full((STATES, ACTIONS), 1 / ACTIONS)
    best = oracle.optimum(rewards, transitions, **process)
    before = np.full_like(q, -np.inf)
    for iteration in range(12):
        fixed_point = oracle.evaluate(policy, rewards, transitions, **process)
        assert (fixed_point >= before - 1e-5).all()  # Lemma 2
        before = fixed_point
        distance = np.abs(q - fixed_point).max()
        for _ in range(60):
            write(sac.target_q, q)
            expected = oracle.backup(q, policy, rewards, transitions, **process)
            with torch.no_grad():
                q = sac._targets(every, alpha).double().numpy().reshape(STATES, ACTIONS)
            np.testing.assert_allclose(q, expected, rtol=1e-5, atol=1e-5)
            shorter = np.abs(q - fixed_point).max()
            assert shorter <= gamma * distance + 1e-4  # T_pi contracts by gamma
            distance = shorter
        np.testing.assert_allclose(q, fixed_point, atol=1e-4)
        policy = oracle.improve(q, 0.7)
        write(sac.q, q)
        write(sac.policy, np.log(policy))
        loss, _ = sac._policy_loss(every.observations, alpha)
        gradient = torch.autograd.grad(loss, list(sac.policy.parameters()))
        assert max(one.abs().max() for one in gradient) < 1e-5
        write(sac.policy, np.log(policy) + np.random.default_rng(iteration).normal(size=q.shape))
        assert sac._policy_loss(every.observations, alpha)[0] > loss
        write(sac.policy, np.log(policy))
    np.testing.assert_allclose(q, best, atol=1e-4)
