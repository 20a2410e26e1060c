"""Pairs of right and wrong completions, and iterative preference optimisation with them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.random_models import rollouts_of
from tests.engine.runs import rows, train
from warpo.engine.config.policy import load_config
from warpo.engine.learner.pairs import make_pairs, pair_minibatches
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.trainers.policy.train import run
from warpo.engine.types import Completion


def groups(rewards: dict[int, list[float]]) -> StepRollouts:
    """Completions of each prompt by its number; the first token of each tells which it is."""
    prompts, completions, numbers = [], [], []
    for prompt, of_prompt in rewards.items():
        rng = random.Random(prompt)
        for i in range(len(of_prompt)):
            ids = [100 * prompt + i, *(rng.randrange(3, 60) for _ in range(rng.randrange(6)))]
            logprobs = [-1.0] * len(ids)
            completions.append(Completion.of(ids, logprobs, finished=True, weight_version=0))
            prompts.append([prompt, 7])
            numbers.append(prompt)
    flat = [reward for of_prompt in rewards.values() for reward in of_prompt]
    return replace(
        rollouts_of(prompts, completions),
        group_ids=np.array(numbers),
        rewards=torch.tensor(flat, dtype=torch.float64),
    )


def label(rollouts: StepRollouts, row: int) -> int:
    sequence = rollouts.sequences[row]
    return int(sequence.token_ids[sequence.prompt_length])


def labels_of(rollouts: StepRollouts, choice: str = "ranked") -> list[tuple[int, int]]:
    pairs = make_pairs(rollouts, choice)
    return [(label(rollouts, p.chosen), label(rollouts, p.rejected)) for p in pairs]


def test_best_goes_with_worst_while_it_is_better() -> None:
    made = groups({1: [0.5, 1.0, 0.0, 0.25], 2: [1.0, 1.0], 3: [0.0, 1.0, 0.5]})
    assert labels_of(made) == [(101, 102), (100, 103), (301, 300)]


def test_pairs_may_be_the_extremes_or_all_that_differ() -> None:
    made = groups({1: [0.5, 1.0, 0.0, 0.5], 2: [1.0, 1.0, 1.0], 3: [0.0, 1.0, 0.5]})
    assert labels_of(made, "extremes") == [(101, 102), (301, 300)]
    better = [(101, 100), (101, 103), (101, 102), (100, 102), (103, 102)]
    assert labels_of(made, "all") == [*better, (301, 302), (301, 300), (302, 300)]
    (minibatch,) = pair_minibatches(made, 1, 1000, seed=0, choice="all")
    assert sum(map(len, minibatch)) == 2 * 8


def test_one_prompt_that_is_drawn_twice_makes_two_groups() -> None:
    made = groups({1: [0.0, 1.0, 0.0, 1.0]})
    assert labels_of(made) == [(101, 102), (103, 100)]
    twice = replace(made, group_ids=np.array([0, 0, 1, 1]))
    assert labels_of(twice) == [(101, 100), (103, 102)]


def test_right_and_wrong_make_as_many_pairs_as_the_fewer_of_them() -> None:
    for right in range(7):
        rewards = [1.0] * right + [0.0] * (6 - right)
        random.Random(right).shuffle(rewards)
        pairs = make_pairs(groups({1: rewards}))
        assert len(pairs) == min(right, 6 - right)
        assert {(rewards[p.chosen], rewards[p.rejected]) for p in pairs} <= {(1.0, 0.0)}
        used = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
        assert len(used) == len(set(used))


def test_micro_batches_hold_the_chosen_and_then_the_rejected() -> None:
    rollouts = groups({prompt: [0.0, 1.0, 0.5, 0.0] for prompt in range(1, 8)})
    whole = sorted(labels_of(rollouts))
    assert len(whole) == 14
    for minibatches, budget in ((1, 1000), (3, 40), (20, 40)):
        dealt = pair_minibatches(rollouts, minibatches, budget, seed=1)
        assert len(dealt) == min(minibatches, 14)
        sizes = [sum(len(rows) // 2 for rows in part) for part in dealt]
        assert sum(sizes) == 14 and max(sizes) - min(sizes) <= 1
        found = []
        for micro in (micro for part in dealt for micro in part):
            batch = rollouts.batch(micro)
            labels = batch.targets[batch.cu_seqlens[:-1].long()].tolist()
            half = len(labels) // 2
            found += zip(labels[:half], labels[half:], strict=True)
            assert max(batch.input_ids.numel(), batch.num_trained) <= budget
        assert sorted(found) == whole
    one, other = (pair_minibatches(rollouts, 3, 40, seed=seed) for seed in (1, 2))
    assert one[0] != other[0]


def test_groups_of_one_reward_give_no_pairs() -> None:
    assert make_pairs(groups({1: [1.0, 1.0], 2: [0.0, 0.0]})) == []
    assert pair_minibatches(groups({1: [0.5] * 4}), 2, 100, seed=0) == []


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


def test_every_completion_may_be_in_many_pairs(folder: Path) -> None:
    once = ("--update.epochs", "1", "--update.minibatches", "1", "--steps", "1")
    (row,) = train(folder, *SETTINGS, *once, "--loss.pairs", "all", "--loss.nll_coef", "0")
    # no completion has moved from its reference
    assert row["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["grad_norm"] > 0


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
