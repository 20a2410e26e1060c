"""Pairs of right and wrong completions, and iterative preference optimisation with them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.runs import rows, train
from warpo.engine.batch import Completion, Rollout
from warpo.engine.config import load_config
from warpo.engine.pairs import make_pairs, pair_minibatches
from warpo.engine.train import run


def group(prompt: int, rewards: list[float]) -> list[Rollout]:
    """Completions of one prompt; the first token of each tells which it is."""
    rng = random.Random(prompt)
    made = []
    for i, reward in enumerate(rewards):
        ids = [100 * prompt + i, *(rng.randrange(3, 60) for _ in range(rng.randrange(6)))]
        completion = Completion(
            token_ids=ids, logprobs=[-1.0] * len(ids), finished=True, weight_version=0
        )
        made.append(Rollout(prompt_ids=[prompt, 7], completion=completion, reward=reward))
    return made


def label(rollout: Rollout) -> int:
    return rollout.completion.token_ids[0]


def test_best_goes_with_worst_while_it_is_better() -> None:
    rollouts = group(1, [0.5, 1.0, 0.0, 0.25]) + group(2, [1.0, 1.0]) + group(3, [0.0, 1.0, 0.5])
    pairs = [(label(chosen), label(rejected)) for chosen, rejected in make_pairs(rollouts)]
    assert pairs == [(101, 102), (100, 103), (301, 300)]


def test_right_and_wrong_make_as_many_pairs_as_the_fewer_of_them() -> None:
    for right in range(7):
        rewards = [1.0] * right + [0.0] * (6 - right)
        random.Random(right).shuffle(rewards)
        pairs = make_pairs(group(1, rewards))
        assert len(pairs) == min(right, 6 - right)
        assert {(pair.chosen.reward, pair.rejected.reward) for pair in pairs} <= {(1.0, 0.0)}
        used = [label(rollout) for pair in pairs for rollout in pair]
        assert len(used) == len(set(used))


def test_micro_batches_hold_the_chosen_and_then_the_rejected() -> None:
    rollouts = [
        rollout for prompt in range(1, 8) for rollout in group(prompt, [0.0, 1.0, 0.5, 0.0])
    ]
    by_label = {label(rollout): rollout for rollout in rollouts}
    whole = sorted((label(a), label(b)) for a, b in make_pairs(rollouts))
    assert len(whole) == 14
    for minibatches, budget in ((1, 1000), (3, 40), (20, 40)):
        dealt = pair_minibatches(rollouts, minibatches, budget, seed=1)
        assert len(dealt) == min(minibatches, 14)
        sizes = [sum(batch.num_sequences // 2 for batch in part) for part in dealt]
        assert sum(sizes) == 14 and max(sizes) - min(sizes) <= 1
        found = []
        for batch in (batch for part in dealt for batch in part):
            starts = batch.completion_cu_seqlens[:-1].long()
            labels = batch.targets[starts].tolist()
            half = len(labels) // 2
            found += zip(labels[:half], labels[half:], strict=True)
            read = [by_label[number].num_tokens for number in labels]
            assert sum(read) <= budget
        assert sorted(found) == whole
    one, other = (pair_minibatches(rollouts, 3, 40, seed=seed) for seed in (1, 2))
    assert [b.targets.tolist() for b in one[0]] != [b.targets.tolist() for b in other[0]]


def test_groups_of_one_reward_give_no_pairs() -> None:
    assert make_pairs(group(1, [1.0, 1.0]) + group(2, [0.0, 0.0])) == []
    assert pair_minibatches(group(1, [0.5] * 4), 2, 100, seed=0) == []


SETTINGS = (
    *("--algorithm", "iterative_dpo", "--sampler", "transformers", "--steps", "2"),
    *("--loss.kl_coef", "0.5", "--update.token_budget", "128", "--evaluation.every_steps", "0"),
)


def test_pairs_of_the_policys_own_completions_train_it(folder: Path) -> None:
    once = ("--update.epochs", "1", "--update.minibatches", "1")
    for row in train(folder, *SETTINGS, *once):
        # the reference is the policy that the step began with: no margin
        assert row["reward/margin"] == pytest.approx(0, abs=1e-5)
        assert row["grad_norm"] > 0 and "loss/policy" not in row
    moved = [*SETTINGS, "--output_dir", "moved"]
    run(load_config(folder / "config.yaml", moved))
    for row in rows(folder, "moved"):
        # the later optimizer steps of a step see what the first has learned
        assert row["reward/margin"] > 1e-3


def test_a_step_without_pairs_leaves_the_weights(folder: Path) -> None:
    (folder / "token_rewards.py").write_text(
        "def low(completions): return [1.0] * len(completions)"
    )
    table = train(folder, *SETTINGS, "--checkpoint.every_steps", "1", "--checkpoint.keep", "0")
    assert [row["step"] for row in table] == [1, 2]
    assert all("loss/preference" not in row and "grad_norm" not in row for row in table)
    assert all(row["reward/degenerate_frac"] == 1 for row in table)
    first, *_, last = sorted((folder / "out/checkpoints").iterdir())
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (first, last))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
