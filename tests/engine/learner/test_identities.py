"""Common ground of the table's algorithms, as identities of their advantages and of the
gradient that a model gets from them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.engine.random_models import rollouts_of
from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.learner.advantages import AdaptiveState, estimate
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.model import inputs_of, load_model
from warpo.engine.models.score import score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import Completion

GROUPS, GROUP_SIZE = 3, 4


@pytest.fixture
def learner(model_path: Callable[[str], str]) -> nn.Module:
    return load_model(model_path("qwen2"), "float32", torch.device("cpu"))


def rollouts(learner: nn.Module) -> StepRollouts:
    """Sampled by the learner itself, as far as its logprobs go; values are 0."""
    rng = random.Random(0)
    lengths, completions, rewards = [], [], []
    for _ in range(GROUPS * GROUP_SIZE):
        length = rng.randint(1, 9)
        ids = [rng.randrange(3, 60) for _ in range(length)]
        lengths.append(length)
        completions.append(Completion.of(ids, [0.0] * length, finished=True, weight_version=0))
        rewards.append(rng.uniform(0, 1))
    prompts = [[5, 9 + i // GROUP_SIZE, 31] for i in range(GROUPS * GROUP_SIZE)]
    made = rollouts_of(prompts, completions, group_size=GROUP_SIZE)
    made.rewards = torch.tensor(rewards, dtype=torch.float64)
    for row, length in enumerate(lengths):
        logp = score(learner, made.batch([row]), 1.0)
        noise = torch.randn(length, generator=torch.Generator().manual_seed(row))
        made.fill("old_logprobs", [row], logp)
        made.fill("ref_logprobs", [row], logp + 0.3 * noise)
        made.fill("values", [row], torch.zeros(length))
    return made


def advantages(row: Algorithm, made: StepRollouts) -> StepRollouts:
    found = replace(made)
    estimate(row, found, AdaptiveState(row.kl_coef))
    return found


def parts_of(made: StepRollouts, column: Tensor) -> tuple[Tensor, ...]:
    return column.split(made.lengths.tolist())


def gradient(learner: nn.Module, row: Algorithm, made: StepRollouts) -> Tensor:
    """Gradient of the first optimizer step, in which every ratio is 1."""
    learner.zero_grad()
    batches = [made.batch(range(5)), made.batch(range(5, len(made)))]
    accumulate_gradients(learner, batches, row.objective, temperature=1.0, max_new_tokens=16)
    return torch.cat([p.grad.flatten() for p in learner.parameters()])


def policy_gradient(learner: nn.Module, made: StepRollouts, weights: list[Tensor]) -> Tensor:
    """-sum of weights times grad log pi, each completion alone, by plain log_softmax."""
    learner.zero_grad()
    for row, weight in enumerate(weights):
        batch = made.batch([row])
        logits = learner(**inputs_of(learner, batch)).logits[0, batch.logit_positions]
        logp = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        (-weight * logp).sum().backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters()])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-3
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 1e-5, error


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_ppo_without_discount_and_values_is_reinforce_with_return_to_go(
    learner: nn.Module, kl_coef: float
) -> None:
    """lambda = 1, gamma = 1, V = 0: A_t = sum of the rewards from t on."""
    made = rollouts(learner)
    ppo = ALGORITHMS["ppo"].replace(gae_lambda=(1.0, 1.0), reward_kl_coef=kl_coef)
    by_ppo = advantages(ppo, made)
    to_go = []
    log_ratios = parts_of(made, made.old_logprobs - made.ref_logprobs)
    for log_ratio, reward in zip(log_ratios, made.rewards.tolist(), strict=True):
        rewards = -kl_coef * log_ratio
        rewards[-1] += reward
        to_go.append(rewards.flip(0).cumsum(0).flip(0))
    together = torch.cat(to_go)
    # the returns that the critic learns are these sums as they are
    torch.testing.assert_close(by_ppo.returns, together, rtol=1e-5, atol=1e-5)
    normalised = [(part - together.mean()) / together.std() for part in to_go]
    found = by_ppo.advantages
    torch.testing.assert_close(found, torch.cat(normalised), rtol=1e-4, atol=1e-5)
    # and the gradient that of REINFORCE with them, a mean over tokens
    weights = [part / len(together) for part in normalised]
    assert_same(gradient(learner, ppo, by_ppo), policy_gradient(learner, made, weights))
    # which has a row: REINFORCE++ takes the same advantages
    plus_plus = ALGORITHMS["reinforce_plus_plus"].replace(reward_kl_coef=kl_coef)
    assert torch.equal(advantages(plus_plus, made).advantages, found)


def test_grpo_without_std_is_rloo_up_to_the_leave_one_out_factor(learner: nn.Module) -> None:
    """r - mean of all = (G - 1) / G (r - mean of the others), of advantages and of gradients."""
    made = rollouts(learner)
    rloo = ALGORITHMS["rloo"].replace(reward_kl_coef=0.0)
    objective = ALGORITHMS["grpo"].objective.replace(
        kl_coef=0.0, aggregation="sequence-mean-token-sum"
    )
    grpo = ALGORITHMS["grpo"].replace(advantage_std="none", objective=objective)
    by_rloo, by_grpo = advantages(rloo, made), advantages(grpo, made)
    factor = GROUP_SIZE / (GROUP_SIZE - 1)
    torch.testing.assert_close(
        by_rloo.advantages, factor * by_grpo.advantages, rtol=1e-5, atol=1e-6
    )
    gradients = [gradient(learner, row, by) for row, by in ((rloo, by_rloo), (grpo, by_grpo))]
    assert_same(gradients[0], factor * gradients[1])
    # and both are the policy gradient with the mean of the other completions as the baseline
    weights, rewards = [], made.rewards.tolist()
    for i, length in enumerate(made.lengths.tolist()):
        start = i // GROUP_SIZE * GROUP_SIZE
        others = [rewards[j] for j in range(start, start + GROUP_SIZE) if j != i]
        advantage = rewards[i] - sum(others) / len(others)
        weights.append(torch.full((length,), advantage / len(made)))
    assert_same(gradients[0], policy_gradient(learner, made, weights))


def test_process_supervision_with_one_step_at_the_end_is_outcome_supervision(
    learner: nn.Module,
) -> None:
    made = rollouts(learner)
    ends = zip(made.lengths.tolist(), made.rewards.tolist(), strict=True)
    made.step_rewards = [[(length - 1, reward)] for length, reward in ends]
    process, outcome = (advantages(ALGORITHMS[name], made) for name in ("grpo_process", "grpo"))
    torch.testing.assert_close(process.advantages, outcome.advantages, rtol=1e-5, atol=1e-6)
