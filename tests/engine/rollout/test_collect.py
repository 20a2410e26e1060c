"""The rollouts of a step: dynamic sampling and greedy baselines, with the transformers sampler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.runs import rows, train
from warpo.engine.config.policy import load_config
from warpo.engine.data.stream import PromptStream
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build
from warpo.engine.trainers.policy.train import run

REWARDS = """
calls = 0

def unequal_for_odd(completions, word):
    return [float(i % 2 and int(w) % 2) for i, w in enumerate(word)]

def unequal_from_the_second_call_on(completions):
    global calls
    calls += 1
    return [float(i % 2 and calls > 1) for i in range(len(completions))]

def low(completions):
    scores = [[int(t[1:]) < 30 for t in text.split()] for text in completions]
    return [sum(s) / max(1, len(s)) for s in scores]
"""

Collect = Callable[..., tuple[StepRollouts, dict[str, float], PromptStream]]


@pytest.fixture
def collected(folder: Path) -> Iterator[Collect]:
    """Collect step 1 of a run with these settings, and open a fresh stream of its prompts."""
    (folder / "some_rewards.py").write_text(REWARDS)
    number = count()
    with ExitStack() as stack:

        def of(reward: str, *overrides: str) -> tuple[StepRollouts, dict[str, float], Any]:
            words = [
                *("--sampler", "transformers", "--output_dir", f"out-{next(number)}"),
                *("--reward.sources", f"some_rewards:{reward}", *overrides),
            ]
            config = load_config(folder / "config.yaml", words)
            rollouts, _, weights = stack.enter_context(build(config, Run(log=NoLog())))
            weights.publish(0)
            prompts = rollouts.stream._items
            stream = PromptStream(
                prompts, prompts.keys, config.rollout.prompts_per_step, config.seed
            )
            return *rollouts.collect(1), stream

        yield of


def prompt_of(rollouts: StepRollouts, row: int) -> list[int]:
    sequence = rollouts.sequences[row]
    return sequence.token_ids[: sequence.prompt_length].tolist()


def prompts_of(rollouts: StepRollouts, group_size: int = 4) -> list[list[int]]:
    """One a group, after a look at all of it."""
    prompts = [prompt_of(rollouts, row) for row in range(len(rollouts))]
    groups = [prompts[i : i + group_size] for i in range(0, len(prompts), group_size)]
    for number, group in enumerate(groups):
        assert all(prompt == group[0] for prompt in group)
        first = number * group_size
        assert len(set(rollouts.group_ids[first : first + group_size].tolist())) == 1
    return [group[0] for group in groups]


def completions_of(rollouts: StepRollouts) -> list[list[int]]:
    return [x.token_ids[x.prompt_length :].tolist() for x in rollouts.sequences]


def test_what_is_sampled_is_measured(collected: Collect) -> None:
    rollouts, metrics, _ = collected("unequal_for_odd", "--algorithm", "grpo")
    rewards = rollouts.rewards.numpy()
    assert metrics["reward/mean"] == pytest.approx(rewards.mean())
    assert metrics["reward/std"] == pytest.approx(rewards.std())
    cut = [not finished for finished in rollouts.finished.tolist()]
    assert metrics["completion/truncated_frac"] == pytest.approx(sum(cut) / len(cut))


class Watched(NoLog):
    """Keeps what is shown."""

    is_watched = True

    def __init__(self) -> None:
        self.shown: list[tuple[str, str, list[tuple[float, str]]]] = []

    def show(self, title: str, prompt: str, completions: list[tuple[float, str]]) -> None:
        self.shown.append((title, prompt, completions))


def test_the_best_and_the_worst_completion_of_a_prompt_are_shown(folder: Path) -> None:
    log = Watched()
    words = ["--sampler", "transformers", "--log.completions_every_steps", "2", "--steps", "3"]
    config = load_config(folder / "config.yaml", words)
    with build(config, Run(log=log)) as (rollouts, _, weights):
        collected = {}
        for step in (1, 2, 3):
            weights.publish(step - 1)
            collected[step], _ = rollouts.collect(step)
    assert [title for title, _, _ in log.shown] == [
        f"step {step}, 2 of the 4 completions of a prompt:" for step in (2, 3)
    ]
    for step, (_, prompt, completions) in zip((2, 3), log.shown, strict=True):
        groups = [collected[step].rewards[i : i + 4].tolist() for i in range(0, 12, 4)]
        teaching = [i for i, group in enumerate(groups) if len(set(group)) > 1]
        first = 4 * teaching[step % len(teaching)]
        rows = range(first, first + 4)
        rewards = collected[step].rewards[rows.start : rows.stop].tolist()
        assert [reward for reward, _ in completions] == [max(rewards), min(rewards)]
        for reward, text in completions:
            row = rows[rewards.index(reward)]
            ids = [*prompt_of(collected[step], row), *completions_of(collected[step])[row]]
            assert [int(t[1:]) for t in f"{prompt} {text}".split() if t[0] == "t"] == [
                token for token in ids if token > 1
            ]


DAPO = ("--algorithm", "dapo", "--loss.kl_coef", "0")


def test_dynamic_sampling_draws_until_every_group_can_teach(collected: Collect) -> None:
    rollouts, metrics, stream = collected("unequal_for_odd", *DAPO)
    draws, expected = 0, []
    while len(expected) < 3:
        draws += 1
        expected += [p.token_ids for p in stream.next() if int(p.fields["word"]) % 2]
    assert draws > 1, "the first prompts are all odd: another seed"
    assert prompts_of(rollouts) == expected[:3]
    assert rollouts.rewards.tolist() == [0.0, 1.0, 0.0, 1.0] * 3
    assert metrics["rollout/draws"] == draws
    assert metrics["rollout/kept_frac"] == pytest.approx(3 / (3 * draws))
    # of all that was drawn: a half of the completions of the odd, none of the others
    assert metrics["reward/mean"] == pytest.approx(0.5 * len(expected) / (3 * draws))


def test_without_draws_left_the_groups_that_can_teach_are_the_step(
    collected: Collect, folder: Path
) -> None:
    lines = [{"prompt": f"t{10 + i} t7", "word": str(int(i == 5))} for i in range(6)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rollouts, metrics, _ = collected("unequal_for_odd", *DAPO, "--rollout.max_draws", "2")
    assert prompts_of(rollouts) == [[15, 7]]
    assert (metrics["rollout/draws"], metrics["rollout/kept_frac"]) == (2, pytest.approx(1 / 6))


def test_where_no_group_can_teach_the_first_draw_is_the_step(collected: Collect) -> None:
    lines = [{"prompt": f"t{10 + i} t7", "word": "0"} for i in range(7)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rollouts, metrics, stream = collected("unequal_for_odd", *DAPO, "--rollout.max_draws", "2")
    assert prompts_of(rollouts) == [p.token_ids for p in stream.next()]
    assert (metrics["rollout/draws"], metrics["rollout/kept_frac"]) == (2, 0.5)


def test_rows_that_draw_once_keep_groups_of_one_reward(collected: Collect) -> None:
    rollouts, metrics, stream = collected("unequal_for_odd", "--algorithm", "grpo")
    assert prompts_of(rollouts) == [p.token_ids for p in stream.next()]
    assert "rollout/draws" not in metrics


def test_a_further_draw_of_the_same_prompt_samples_anew(collected: Collect) -> None:
    Path("one.jsonl").write_text(json.dumps({"prompt": "t9 t8"}))
    one = ("--data.train", "one.jsonl", "--data.eval", "", "--evaluation.every_steps", "0")
    one += ("--rollout.prompts_per_step", "1", "--rollout.max_draws")
    reward = "unequal_from_the_second_call_on"
    first, once, _ = collected(reward, *DAPO, *one, "1")
    second, twice, _ = collected(reward, *DAPO, *one, "2")
    assert "rollout/draws" not in once and twice["rollout/draws"] == 2
    texts = [completions_of(rollouts) for rollouts in (first, second)]
    assert texts[0] != texts[1]
    assert second.rewards.tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("truncated", ["score", "zero"])
def test_rewards_of_sources_stand_apart_and_unweighed(collected: Collect, truncated: str) -> None:
    sources = ("some_rewards:low", "-0.5 * some_rewards:unequal_for_odd", "0 * overlong:2")
    words = ("--algorithm", "gdpo", "--reward.truncated", truncated, "--reward.sources", *sources)
    rollouts, metrics, _ = collected("low", *words)
    columns, weights = rollouts.source_rewards, rollouts.source_weights
    assert columns is not None and columns.shape == (len(rollouts), 2)
    assert weights is not None and weights.tolist() == [1.0, -0.5]
    torch.testing.assert_close(columns @ weights, rollouts.rewards)
    if truncated == "score":
        means = [metrics[f"reward/some_rewards:{name}"] for name in ("low", "unequal_for_odd")]
        assert columns.mean(0).tolist() == pytest.approx(means)
    else:
        assert rollouts.finished is not None and not rollouts.finished.all()
        assert (columns[~rollouts.finished] == 0).all() and columns.any()


def test_the_greedy_baseline_is_the_reward_of_the_most_probable_completion(
    collected: Collect, folder: Path
) -> None:
    rollouts, _, _ = collected("low", "--algorithm", "remax")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    found = rollouts.baseline_rewards.tolist()
    for prompt in prompts_of(rollouts):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        greedy = [token for token in ids[len(prompt) :] if token > 1]
        reward = sum(token < 30 for token in greedy) / max(1, len(greedy))
        baselines = [b for row, b in enumerate(found) if prompt_of(rollouts, row) == prompt]
        assert baselines == pytest.approx([reward] * 4)
    assert len(set(found)) > 1, "all prompts are answered alike"


@pytest.mark.parametrize("name", ["dapo", "reinforce", "ppo_kl"])
def test_what_a_step_carries_to_the_next_is_resumed(folder: Path, name: str) -> None:
    """Further draws of prompts, the moving average of the rewards, the adapted KL weight."""
    (folder / "some_rewards.py").write_text(REWARDS)
    reward = "unequal_for_odd" if name == "dapo" else "low"
    words = [
        *("--sampler", "transformers", "--algorithm", name, "--loss.kl_coef", "0.1"),
        *("--reward.sources", f"some_rewards:{reward}", "--update.epochs", "1"),
        *("--evaluation.every_steps", "1", "--steps"),
    ]
    run(load_config(folder / "config.yaml", [*words, "2", "--output_dir", "whole"]))
    train(folder, *words, "1")
    table = train(folder, *words, "2", "--resume")
    assert table == rows(folder, "whole")
    if name == "dapo":
        assert max(row["rollout/draws"] for row in table[1:]) > 1
    if name == "ppo_kl":
        assert table[1]["kl/coef"] != table[2]["kl/coef"]
