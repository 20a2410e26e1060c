import math

import numpy as np
import pytest
import torch
from torch import nn

from warpo.engine.trainers.control.networks import (
    ActorCritic,
    SquashedPolicy,
    Stack,
    TwinQ,
    gaussian,
)


def as_linear(stack, index):
    """One network of a stack, layer by layer."""
    layers = []
    for weight, bias in zip(stack.weights, stack.biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[2])
        with torch.no_grad():
            layer.weight.copy_(weight[index].T)
            layer.bias.copy_(bias[index, 0])
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("sizes", [[3, 5], [4, 8, 1], [4, 7, 6, 2]])
def test_a_stack_is_its_networks_side_by_side(sizes):
    torch.manual_seed(0)
    stack, inputs = Stack(2, sizes, torch.tanh), torch.randn(6, sizes[0])
    outputs = stack(inputs)
    assert outputs.shape == (2, 6, sizes[-1])
    (outputs * torch.tensor([1.0, -2.0])[:, None, None]).square().sum().backward()
    for index, factor in enumerate((1.0, -2.0)):
        alone = as_linear(stack, index)
        expected = alone(inputs)
        torch.testing.assert_close(outputs[index], expected)
        torch.testing.assert_close(stack.only(index, inputs), expected)
        (expected * factor).square().sum().backward()
        for weight, layer in zip(stack.weights, alone[::2], strict=True):
            torch.testing.assert_close(weight.grad[index], layer.weight.grad.T)


def test_orthogonal_weights_have_their_gain():
    torch.manual_seed(0)
    stack = Stack(2, [6, 8, 3], torch.tanh)
    stack.orthogonal([2.0, 0.5])
    for index in range(2):
        first, second = stack.weights[0][index], stack.weights[1][index]
        torch.testing.assert_close(first @ first.T, 4 * torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(second.T @ second, 0.25 * torch.eye(3), atol=1e-5, rtol=0)
    assert not stack.biases[0].any()


def test_a_new_policy_is_near_uniform_and_its_values_have_gain_one():
    torch.manual_seed(0)
    network, inputs = ActorCritic(4, 3, True, [64, 64]), torch.randn(32, 4)
    _, entropy, values = network.evaluate(inputs, torch.zeros(32, dtype=torch.int64))
    assert entropy.min() > math.log(3) - 1e-3
    torch.testing.assert_close(network.stack.weights[-1][1, :, 0].norm(), torch.tensor(1.0))
    torch.testing.assert_close(network.values(inputs), values)


def test_gaussian_logprobs_and_entropy():
    random = np.random.default_rng(0)
    mean, actions, log_std = random.normal(size=(5, 3)), random.normal(size=(5, 3)), [-1, 0.0, 0.7]
    std = np.exp(log_std)
    # the density of https://en.wikipedia.org/wiki/Normal_distribution, component by component
    density = np.exp(-(((actions - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    entropy = 0.5 * np.log(2 * np.pi * np.e * std**2)
    logprobs, entropies = gaussian(
        *(torch.tensor(x, dtype=torch.float32) for x in (mean, log_std, actions))
    )
    np.testing.assert_allclose(logprobs, np.log(density).sum(1), rtol=1e-5)
    np.testing.assert_allclose(entropies, np.full(5, entropy.sum()), rtol=1e-6)


def test_discrete_draws_have_the_frequencies_of_the_softmax():
    torch.manual_seed(0)
    network, inputs = ActorCritic(2, 4, True, [8]), torch.randn(1, 2)
    with torch.no_grad():
        network.stack.weights[-1][0] *= 300
        logits = network.stack.only(0, inputs)
        draws = network.sample(inputs.expand(40_000, 2), network.draw_noise(40_000))
    frequencies = draws.bincount(minlength=4) / 40_000
    assert 0.02 < logits.softmax(1).min() < 0.2
    torch.testing.assert_close(frequencies, logits.softmax(1)[0], atol=0.01, rtol=0)


def test_continuous_draws_are_mean_and_noise():
    torch.manual_seed(0)
    network, inputs = ActorCritic(2, 3, False, [8]), torch.randn(5, 2)
    with torch.no_grad():
        network.log_std.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        noise = network.draw_noise(5)
        mean = network.stack.only(0, inputs)
        expected = mean + noise * torch.tensor([-1.0, 0.0, 1.0]).exp()
        torch.testing.assert_close(network.sample(inputs, noise), expected)
    assert abs(network.draw_noise(4000).std() - 1) < 0.05


def test_the_squashed_policy_takes_halves_of_its_output_and_twin_q_both_inputs():
    torch.manual_seed(0)
    policy, q, inputs = SquashedPolicy(3, 2, [8]), TwinQ(3, 2, [8]), torch.randn(5, 3)
    actions, logprobs = policy(inputs, torch.zeros(5, 2))
    mean, log_std = policy.stack.only(0, inputs).split(2, 1)
    torch.testing.assert_close(actions, mean.tanh())
    density = gaussian(mean, log_std[0], mean)[0][0] - (1 - mean[0].tanh() ** 2).log().sum()
    torch.testing.assert_close(logprobs[0], density)
    values = q(inputs, actions)
    assert values.shape == (2, 5)
    torch.testing.assert_close(values, q.stack(torch.cat([inputs, actions], 1))[..., 0])
