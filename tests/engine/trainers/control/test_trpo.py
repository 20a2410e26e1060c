"""A step of TRPO against explicit matrices, from https://arxiv.org/abs/1502.05477."""

import copy

import numpy as np
import pytest
import torch

from warpo.engine.trainers.control.environments import Environments, spaces_of
from warpo.engine.trainers.control.networks import gaussian
from warpo.engine.trainers.control.trpo import (
    TrpoLearner,
    conjugate_gradient,
    fisher_product,
    mean_kl,
)

WALKS = ("warpo-tests/Walk-v0", "warpo-tests/WalkContinuous-v0")


@pytest.fixture
def learner(config):
    def make(environment=WALKS[0], **trpo):
        settings = config("trpo_gymnasium", environment=environment, num_envs=4, trpo=trpo)
        torch.manual_seed(0)
        environments = Environments(settings)
        trpo = TrpoLearner(settings, spaces_of(settings), environments, torch.device("cpu"))
        with torch.no_grad():
            for parameter in trpo.network.parameters():  # a policy that is not near uniform
                parameter.add_(0.3 * torch.randn_like(parameter))
        return trpo

    return make


def quiet(done, total):
    """No progress is shown."""


def samples_of(trpo):
    trpo.rollouts.collect(quiet)
    return trpo.rollouts.samples()


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def in_float64(trpo, samples):
    trpo.network.double()
    return samples._replace(observations=samples.observations.double())


def scores(network, observations, actions):
    """The gradient of log pi of each row, (B, parameters)."""
    rows = []
    for observation, action in zip(observations, actions, strict=True):
        logits = network.policy(observation[None])
        if action.is_floating_point():
            logprob = gaussian(logits, network.log_std, action[None])[0]
        else:
            logprob = logits.log_softmax(1)[:, action]
        gradient = torch.autograd.grad(logprob.sum(), list(network.parameters()))
        rows.append(flat(gradient))
    return torch.stack(rows)


def explicit_fisher(network, observations):
    """Mean over the states of E[score score'], a sum over the actions of a discrete policy."""
    probs = network.policy(observations).softmax(1).detach()
    total = 0.0
    for action in range(probs.shape[1]):
        rows = scores(network, observations, torch.full((len(observations),), action))
        total = total + (rows.T * probs[:, action]) @ rows
    return total / len(observations)


def test_the_product_is_that_of_the_fisher_matrix_of_a_discrete_policy(learner):
    trpo = learner()
    samples = in_float64(trpo, samples_of(trpo))
    fisher = explicit_fisher(trpo.network, samples.observations)
    product = fisher_product(trpo.network, samples.observations)
    torch.manual_seed(3)
    for _ in range(3):
        vector = torch.randn(len(fisher), dtype=torch.float64)
        torch.testing.assert_close(product(vector), fisher @ vector, rtol=1e-9, atol=1e-12)
    assert torch.linalg.matrix_rank(fisher) > 5


def test_the_product_is_that_of_the_fisher_matrix_of_a_gaussian_policy(learner):
    """With mean m and deviations s: F = mean of J_m' diag(1 / s^2) J_m, and 2 for each log s."""
    trpo = learner(WALKS[1])
    samples = in_float64(trpo, samples_of(trpo))
    network, observations = trpo.network, samples.observations
    parameters = list(network.parameters())
    variance = (2 * network.log_std.detach()).exp()
    fisher = 0.0
    for component in range(2):
        for observation in observations:
            mean = network.policy(observation[None])[0, component]
            gradient = torch.autograd.grad(mean, parameters, materialize_grads=True)
            row = flat(gradient)
            fisher = fisher + torch.outer(row, row) / variance[component] / len(observations)
    scale = [
        2.0 * torch.ones(2) if p is network.log_std else torch.zeros(p.shape) for p in parameters
    ]
    fisher = fisher + torch.diag(flat(scale).double())
    product = fisher_product(network, observations)
    torch.manual_seed(3)
    vector = torch.randn(len(fisher), dtype=torch.float64)
    torch.testing.assert_close(product(vector), fisher @ vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("environment", WALKS)
def test_half_the_square_of_a_small_step_is_its_kl(learner, environment):
    trpo = learner(environment)
    samples = in_float64(trpo, samples_of(trpo))
    network, observations = trpo.network, samples.observations
    old = network.policy(observations).detach()
    old_std = None if network.log_std is None else network.log_std.detach().clone()
    product = fisher_product(network, observations)
    parameters = list(network.parameters())
    vector = 1e-4 * torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    expected = 0.5 * vector @ product(vector)
    with torch.no_grad():
        pieces = vector.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.add_(piece.view_as(parameter))
        kl = mean_kl(old, old_std, network.policy(observations), network.log_std)
    torch.testing.assert_close(kl, expected, rtol=2e-3, atol=0)


def test_mean_kl_is_the_expectation_of_the_log_ratio():
    random = np.random.default_rng(0)
    old, new = random.normal(size=(4, 3)), random.normal(size=(4, 3))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (old, new))
    discrete = np.mean([sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)])
    tensors = [torch.tensor(x) for x in (old, new)]
    np.testing.assert_allclose(mean_kl(tensors[0], None, tensors[1], None), discrete)
    stds = [torch.tensor([-0.4, 0.2, 0.1]), torch.tensor([0.3, -0.1, 0.4])]
    mine = mean_kl(tensors[0], stds[0].double(), tensors[1], stds[1].double())
    # by quadrature, component by component
    total = 0.0
    x = np.linspace(-12, 12, 20_001)
    for row in range(4):
        for i in range(3):
            s, t = np.exp(stds[0][i].item()), np.exp(stds[1][i].item())
            log_p = -0.5 * ((x - old[row, i]) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))
            log_q = -0.5 * ((x - new[row, i]) / t) ** 2 - np.log(t * np.sqrt(2 * np.pi))
            total += np.trapezoid(np.exp(log_p) * (log_p - log_q), x)
    np.testing.assert_allclose(mine, total / 4, rtol=1e-6)


def test_conjugate_gradient_solves_in_as_many_steps_as_there_are_unknowns():
    random = np.random.default_rng(0)
    root = random.normal(size=(6, 6))
    matrix, target = torch.tensor(root @ root.T + np.eye(6)), torch.tensor(random.normal(size=6))
    calls = []

    def product(vector):
        calls.append(vector)
        return matrix @ vector

    x = conjugate_gradient(product, target, 6)
    torch.testing.assert_close(matrix @ x, target, rtol=0, atol=1e-4)
    assert len(calls) == 6
    conjugate_gradient(lambda vector: 2 * vector, target, 50)
    zero = conjugate_gradient(product, torch.zeros(6, dtype=torch.float64), 6)
    assert not zero.any() and len(calls) == 6


@pytest.mark.parametrize("environment", WALKS)
def test_the_step_is_the_scaled_solution_and_keeps_within_the_region(learner, environment):
    trpo = learner(environment, cg_iterations=200, max_kl=0.01, normalize_advantages=False)
    samples = samples_of(trpo)
    network = copy.deepcopy(trpo.network).double()
    observations = samples.observations.double()
    start = flat(network.parameters()).detach().clone()
    rows = scores(network, observations, samples.actions)
    gradient = (rows.T @ samples.advantages.double()) / len(rows)
    product = fisher_product(network, observations)
    identity = torch.eye(len(start), dtype=torch.float64)
    matrix = torch.stack([product(row) for row in identity]) + 0.1 * identity
    x = torch.linalg.solve(matrix, gradient)
    step = (2 * 0.01 / (x @ matrix @ x)).sqrt() * x
    metrics = trpo._update_policy(samples)
    taken = flat(trpo.network.parameters()).detach() - start
    share = metrics["line_search/length"]
    assert share > 0
    torch.testing.assert_close(taken, share * step, rtol=1e-2, atol=1e-4 * step.abs().max().item())
    assert 0 < metrics["kl/mean"] <= 0.01
    assert -metrics["loss/policy"] > samples.advantages.mean()
    # the value function is not the step's
    for weight, old in zip(trpo.network.stack.weights, network.stack.weights, strict=True):
        assert torch.equal(weight[1].double(), old[1])


def test_a_step_that_leaves_the_region_is_shortened_and_one_that_never_fits_is_not_taken(
    learner, monkeypatch
):
    trpo = learner(line_search_iterations=3, line_search_shrink=0.5)
    samples = samples_of(trpo)
    start = flat(trpo.network.parameters()).detach().clone()
    rows = scores(trpo.network, samples.observations, samples.actions)
    uphill = (rows.T @ samples.advantages) / len(rows)
    old = trpo._surrogate(samples)[0].item()
    assert trpo._line_search(samples, old, 1e4 * uphill) == (0.0, old, 0.0)
    assert torch.equal(flat(trpo.network.parameters()), start)
    assert trpo._line_search(samples, old, -1e-3 * uphill)[0] == 0.0  # L falls
    assert torch.equal(flat(trpo.network.parameters()), start)
    length, surrogate, _ = trpo._line_search(samples, old, 1e-3 * uphill)
    assert length == 1.0 and surrogate > old
    tried = iter([1.0, 0.005])
    monkeypatch.setattr(
        "warpo.engine.trainers.control.trpo.mean_kl", lambda *_: torch.tensor(next(tried))
    )
    assert trpo._line_search(samples, old, 1e-2 * uphill)[0] == 0.5


def test_advantages_of_zero_take_no_step(learner):
    trpo = learner()
    samples = samples_of(trpo)
    start = flat(trpo.network.parameters()).detach().clone()
    metrics = trpo._update_policy(samples._replace(advantages=torch.zeros(32)))
    assert metrics["line_search/length"] == 0 and metrics["loss/policy"] == 0
    assert torch.equal(flat(trpo.network.parameters()), start)


@pytest.mark.parametrize("environment", WALKS)
def test_the_value_function_learns_its_returns_and_leaves_the_policy_alone(learner, environment):
    trpo = learner(environment, value_epochs=30)
    samples = samples_of(trpo)
    trpo._update_policy(samples)
    policy = trpo.network.policy(samples.observations).detach()
    deviations = None if trpo.network.log_std is None else trpo.network.log_std.detach().clone()
    errors = []
    for _ in range(4):
        trpo._update_value(samples)
        values = trpo.network.values(samples.observations)
        errors.append((values - samples.returns).square().mean().item())
    assert errors[0] > errors[1] > errors[3]
    assert torch.equal(trpo.network.policy(samples.observations), policy)
    if deviations is not None:
        assert torch.equal(trpo.network.log_std, deviations)
