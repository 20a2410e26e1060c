"""The optimizer steps of a step: how rollouts are dealt, what the policy moved, what ends them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.runs import train
from warpo.engine.config.policy import load_config
from warpo.engine.learner.learner import Learner
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build

PLAIN = ("--sampler", "transformers", "--evaluation.every_steps", "0")


@contextmanager
def collected(folder: Path, *words: str) -> Iterator[tuple[Learner, StepRollouts]]:
    """A learner with the rollouts of its first step."""
    config = load_config(folder / "config.yaml", [*PLAIN, *words])
    with build(config, Run(log=NoLog())) as (rollouts, learner, _):
        learner.reference.begin(learner.model)
        yield learner, rollouts.collect(1)[0]


def logprobs_of(folder: Path, learner: Learner, made: StepRollouts, row: int) -> Tensor:
    """Those of the completion by transformers itself, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    plain.load_state_dict(learner.model.state_dict())
    ids, start = torch.from_numpy(made.sequences[row].token_ids), made.sequences[row].prompt_length
    with torch.no_grad():
        logits = plain(ids[None]).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]


@pytest.mark.parametrize("words", [("--algorithm", "ppo_kl"), ("--update.max_kl", "100")])
def test_the_kl_of_a_step_is_that_of_its_first_policy_to_its_last(
    folder: Path, words: tuple[str, ...]
) -> None:
    """https://arxiv.org/abs/1707.06347 section 4, over a completion of each prompt."""
    with collected(folder, *words) as (learner, made):
        rows = [group * made.group_size + group for group in range(3)]
        old = [logprobs_of(folder, learner, made, row) for row in rows]
        found = learner.update(made)["kl/step"]
        new = [logprobs_of(folder, learner, made, row) for row in rows]
    log_ratio = torch.cat(new) - torch.cat(old)
    expected = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert expected > 1e-4
    # old_logprobs in float32
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_weight_of_the_penalty_follows_the_kl_of_the_whole_step(folder: Path) -> None:
    words = ("--algorithm", "ppo_kl", "--loss.kl_coef", "1", "--loss.kl_target", "1e-9")
    table = train(folder, *PLAIN, *words, "--update.epochs", "1", "--steps", "3")
    assert [row["kl/coef"] for row in table] == [1, 2, 4]
    assert all(row["kl/mean"] == row["kl/step"] > 1.5e-9 for row in table)


def dealt(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[list[tuple]]:
    """For each optimizer step of a step the completions that it learned from."""
    found: list[list[tuple]] = []
    with collected(folder, *words) as (learner, made):
        take = learner.train_step

        def record(batches: Any, step: int, update: int) -> Any:
            tokens = [
                tuple(b.targets[start:stop].tolist())
                for b in batches
                for start, stop in b.cu_seqlens.unfold(0, 2, 1).tolist()
            ]
            found.append(sorted(tokens))
            return take(batches, step, update)

        monkeypatch.setattr(learner, "train_step", record)
        learner.update(made)
    return found


def test_every_epoch_deals_the_rollouts_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dealt(folder, monkeypatch, "--update.epochs", "3")
    epochs = [found[i : i + 2] for i in (0, 2, 4)]
    whole = [sorted(minibatch[0] + minibatch[1]) for minibatch in epochs]
    assert whole[0] == whole[1] == whole[2] and len(whole[0]) == 12
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert dealt(folder, monkeypatch, "--update.epochs", "3") == found
    # the first does not depend on how many follow
    assert dealt(folder, monkeypatch, "--update.epochs", "1") == found[:2]


@pytest.mark.parametrize(("limit", "epochs"), [("1e-9", 1), ("100", 4)])
def test_a_kl_above_the_limit_ends_the_epochs(folder: Path, limit: str, epochs: int) -> None:
    with collected(folder, "--update.max_kl", limit, "--update.epochs", "4") as (learner, made):
        metrics = learner.update(made)
        steps = {state["step"] for state in learner.optimizer.state.values()}
    assert metrics["update/epochs"] == epochs
    assert {int(step) for step in steps} == {2 * epochs}
    assert (metrics["kl/step"] > float(limit)) == (epochs == 1)
    # before the last update that was taken
    assert metrics["mismatch/staleness_max"] > 1e-4


@pytest.mark.parametrize("limit", ["1e-9", "none"])
def test_the_learning_rates_fall_to_0_at_the_end_of_the_run(folder: Path, limit: str) -> None:
    """Of the critic too, whether or not all epochs are taken."""
    words = ["--algorithm", "ppo", "--critic.warmup_steps", "1", "--update.schedule", "linear"]
    # the rollouts of the first policy serve its successors too
    words += ["--probe.num_sequences", "0"]
    config = load_config(
        folder / "config.yaml", [*PLAIN, *words, "--update.max_kl", limit, "--steps", "3"]
    )
    with build(config, Run(log=NoLog())) as (rollouts, learner, weights):
        learner.reference.begin(learner.model)
        made, _ = rollouts.collect(1)
        rates = []
        for _ in range(3):
            learner.update(made)
            assert learner.critic is not None
            critic = learner.critic._schedule.get_last_lr()[0] / config.critic.lr
            rates.append((learner.schedule.get_last_lr()[0] / config.update.lr, critic))
    expected = [(1, 2 / 3), (1 / 2, 1 / 3), (0, 0)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
