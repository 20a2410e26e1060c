"""Completions that the length limit cut: what they are rewarded with, what was still to come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.learner.test_epochs import collected
from warpo.engine.learner.advantages import estimate
from warpo.engine.models.step_rollouts import StepRollouts

GAMMA, LAMBDA = 0.9, 0.8
WORDS = (
    *("--algorithm", "ppo", "--critic.bootstrap", "true", "--loss.whiten", "false"),
    *("--loss.kl_coef", "0", "--loss.gamma", str(GAMMA)),
)


def by_the_formula(made: StepRollouts, last_values: list[float], lambdas: list[float]) -> Tensor:
    """A_t = delta_t + gamma lambda A_(t+1), delta_t = r_t + gamma V(s_(t+1)) - V(s_t)."""
    found = []
    for row, last in enumerate(last_values):
        values = [*made.values[made.tokens_of([row])].tolist(), last]
        advantage, of_row = 0.0, list[float]()
        for t in reversed(range(len(values) - 1)):
            reward = made.rewards[row].item() if t == len(values) - 2 else 0.0
            delta = reward + GAMMA * values[t + 1] - values[t]
            advantage = delta + GAMMA * lambdas[row] * advantage
            of_row.insert(0, advantage)
        found += of_row
    return torch.tensor(found)


@pytest.mark.parametrize("model", ["policy", "shared"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_cut_completion_has_the_value_of_its_last_state(
    folder: Path, model: str, adaptive: bool
) -> None:
    gae_lambda = ("length:0.5", "0.8") if adaptive else (str(LAMBDA), str(LAMBDA))
    words = (*WORDS, "--critic.model", model, "--loss.gae_lambda", *gae_lambda)
    with collected(folder, *words) as (learner, made):
        critic = learner.critic
        assert critic is not None and made.finished is not None
        # of tokens drawn at random most are cut: let every other one be
        made.finished = torch.arange(len(made)) % 2 == 0
        head = critic.value_head if model == "shared" else critic._network.score
        torch.manual_seed(0)
        nn.init.normal_(head.weight, std=0.5)
        learner.score(made, recompute_old=False)
        trunk = learner.model.model if model == "shared" else critic._network.model
        expected = []
        for row in range(len(made)):
            one = made.batch([row])
            with torch.no_grad():
                hidden = trunk(
                    **{"input_ids": one.input_ids, "position_ids": one.position_ids},
                    attention_mask=torch.ones_like(one.input_ids),
                    gather_index=one.gather_index,
                    scatter_index=one.scatter_index,
                    subtree_end=one.subtree_end,
                    segments=one.segments,
                ).last_hidden_state
            last = head(hidden[:, -1]).item()
            expected.append(0.0 if made.finished[row] else last)
        estimate(learner.algorithm, made, learner.adaptive)
    torch.testing.assert_close(made.last_values, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert made.last_values.abs().max() > 0.1
    lambdas = [LAMBDA] * len(made)
    if adaptive:
        lambdas = [max(0.0, 1 - 1 / (0.5 * n)) for n in made.lengths.tolist()]
    torch.testing.assert_close(
        made.advantages, by_the_formula(made, expected, lambdas), rtol=1e-4, atol=1e-5
    )
    returns = by_the_formula(made, expected, [LAMBDA] * len(made)) + made.values
    torch.testing.assert_close(made.returns, returns, rtol=1e-4, atol=1e-5)


def test_without_bootstrap_nothing_follows_a_cut_completion(folder: Path) -> None:
    with collected(folder, "--algorithm", "ppo") as (learner, made):
        learner.score(made, recompute_old=False)
        assert made.last_values is None and not made.finished.all()


def test_a_reward_may_need_an_end(folder: Path) -> None:
    # few tokens end a sequence by chance: let a good share do so
    (folder / "token_rewards.py").write_text(
        "def low(completions): return [1.0] * len(completions)"
    )
    with collected(folder, "--reward.truncated", "zero", "--rollout.group_size", "64") as (_, made):
        assert 0 < made.finished.sum() < len(made)
        assert torch.equal(made.rewards, made.finished.double())
    with collected(folder, "--rollout.group_size", "64") as (_, made):
        assert torch.equal(made.rewards, torch.ones(len(made), dtype=torch.float64))
