"""The reward model that learns in a run: its loss and step by the formula, its pairs, resume."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from tests.engine.learner.test_critic import rollouts
from tests.engine.runs import rows, train
from warpo.engine.config.policy import Config, load_config
from warpo.engine.config.resolve import resolve
from warpo.engine.config.reward_model import reward_sources, reward_training
from warpo.engine.errors import ConfigError
from warpo.engine.learner.reward_model import RewardModelLearner
from warpo.engine.rollout.evaluate import Verdict
from warpo.engine.rollout.labelled import LabelledPair, PairSource
from warpo.engine.rollout.rewards.model import RewardModel
from warpo.engine.rollout.rewards.reader import SameTokens
from warpo.engine.run import atomic, checkpoint
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build
from warpo.engine.trainers.policy.train import run
from warpo.engine.types import Completion, Prompt

SETTINGS = (
    *("--sampler", "transformers", "--algorithm", "iterative_grpo", "--evaluation.every_steps"),
    *("0", "--update.epochs", "1", "--update.minibatches", "1", "--update.token_budget", "128"),
    *("--loss.reference_every_steps", "2", "--checkpoint.every_steps", "1"),
    *("--reward.sources", "model:rm", "--reward_model.labels", "token_rewards:low"),
    *("--reward_model.lr", "1e-3", "--reward_model.batch_size", "8", "--reward_model.replay"),
    *("0.25", "--reward_model.pairs_per_step", "9"),
)


class Source:
    """A reward model without files or tokenizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.path, self.reader = model, "rm", SameTokens(None)
        self._token_budget, self._device = 64, torch.device("cpu")

    last_scores, _scores = RewardModel.last_scores, RewardModel._scores
    _check_finite = RewardModel._check_finite


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", [*SETTINGS, *overrides])


def pair(*ids: int) -> LabelledPair:
    """Of a prompt of two tokens, a completion of two and one of three."""
    return LabelledPair.of([7, 8], ids[:2], ids[2:])


PAIRS = [pair(10, 11, 20, 21, 22), pair(30, 31, 40, 41, 42), pair(12, 13, 23, 24, 25)]


def plain_score(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]


def plain_loss(model: torch.nn.Module, pairs: list[LabelledPair]) -> torch.Tensor:
    """1 / |B| sum of -log sigmoid(r(x, chosen) - r(x, rejected)), a sequence at a time."""
    margins = [
        plain_score(model, p.chosen.token_ids.tolist())
        - plain_score(model, p.rejected.token_ids.tolist())
        for p in pairs
    ]
    return -F.logsigmoid(torch.stack(margins)).mean()


@pytest.fixture
def learner(folder, reward_model, monkeypatch):
    """A learner that learns after every step, and a copy of its model before it has."""
    model = reward_model()
    config = settings(folder, "--update.max_grad_norm", "1e9", "--reward_model.every_steps", "1")
    monkeypatch.setattr(RewardModelLearner, "_save", lambda *_: None)
    from warpo.engine.models.scalar import load_scalar_model

    source = Source(load_scalar_model("rm", "float32", torch.device("cpu")))
    return RewardModelLearner(config, source, 1), model, source


def test_a_step_is_adamw_on_the_mean_of_minus_log_sigmoid(learner):
    trained, plain, source = learner
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    loss = plain_loss(plain, PAIRS)
    loss.backward()
    optimizer.step()
    metrics = trained.update(1, PAIRS)
    assert metrics["reward_model/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert (metrics["reward_model/pairs"], metrics["reward_model/replayed"]) == (3.0, 0.0)
    own = source.model.state_dict()
    for name, weight in plain.state_dict().items():
        # Adam's first step has the size of lr whatever the gradient: one near 0 may round away
        close = (own[name] - weight).abs() < 2e-5
        assert close.float().mean() > 0.999, name
    with torch.no_grad():
        scores = [plain_score(plain, s.token_ids.tolist()).item() for p in PAIRS for s in p]
    assert metrics["reward_model/bias"] == pytest.approx(-sum(scores) / 6, abs=1e-4)
    assert sum(source.last_scores([s for p in PAIRS for s in p])) == pytest.approx(0, abs=1e-4)


def test_older_pairs_are_a_share_of_a_batch_and_a_sample_of_all(learner):
    trained, _, _ = learner
    trained.update(1, PAIRS)
    # 0.25 of 12 are 3, all that there are
    again = trained.update(2, PAIRS * 3)
    assert (again["reward_model/pairs"], again["reward_model/replayed"]) == (9.0, 3.0)
    assert again["reward_model/loss"] < 2
    assert len(trained._old) == trained._seen == 12
    assert trained.update(3, []) == {"reward_model/pairs": 0.0}


def test_the_older_pairs_are_bounded(folder, learner):
    _, _, source = learner
    config = settings(folder, "--reward_model.every_steps", "1", "--reward_model.replay_size", "4")
    trained = RewardModelLearner(config, source, 1)
    for step in range(1, 5):
        trained.update(step, [pair(step, 3, 4, 5, 6)] * 5)
    assert (len(trained._old), trained._seen) == (4, 20)


def test_it_learns_what_the_labels_say(learner):
    trained, _, _ = learner
    found = [trained.update(step, PAIRS) for step in range(1, 8)]
    assert found[-1]["reward_model/accuracy"] == 1.0
    assert found[-1]["reward_model/loss"] < 0.5 * found[0]["reward_model/loss"]


def test_its_state_goes_through_a_checkpoint(learner, folder):
    trained, _, source = learner
    trained.update(1, PAIRS)
    trained._new = PAIRS[:1]
    state = copy.deepcopy(trained.state_dict())
    after = trained.update(2, PAIRS)
    other = RewardModelLearner(
        settings(folder, "--update.max_grad_norm", "1e9"), Source(copy.deepcopy(source.model)), 1
    )
    other.load_state_dict(state)
    assert other.update(2, PAIRS) == after


def test_its_learning_rate_falls_to_0_at_the_end_of_the_run(learner, folder):
    """9 pairs and 3 older ones are two batches of 8, of 4 rounds; those that lack count."""
    _, _, source = learner
    words = ("--update.schedule", "linear", "--reward_model.every_steps", "1", "--steps", "4")
    trained = RewardModelLearner(settings(folder, *words), source, 1)
    rates = []
    for step, pairs in enumerate([PAIRS * 3, PAIRS, [], PAIRS * 3], start=1):
        trained.update(step, pairs)
        rates.append(trained._schedule.get_last_lr()[0])
    assert rates == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])


class Sources:
    """Rewards that pass tokens on as they are."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def source(self, name: str) -> RewardModel:
        return self._model

    def texts(self, completions: list[Completion]) -> list[str]:
        return [""] * len(completions)


def test_unequal_labels_of_a_prompt_are_pairs(monkeypatch):
    monkeypatch.setattr("warpo.engine.rollout.labelled.RewardModel", Source)
    prompts = [Prompt(token_ids=[5, i], fields={}, prompt_id=i) for i in range(2)]
    groups = [
        [Completion.of([10 * i + j], [0.0], finished=True, weight_version=0) for j in range(3)]
        for i in (1, 2)
    ]
    verdicts = [
        [Verdict(9.0, None, {"math": label, "model": -label}) for label in labels]
        for labels in ([1.0, 0.0, 1.0], [0.5, 0.5, 0.5])
    ]

    def drawn(limit: int, step: int = 1) -> list[tuple[int, int]]:
        source = PairSource(
            Sources(Source(torch.nn.Linear(1, 1))),
            model="model",
            labels="math",
            limit=limit,
            seed=0,
        )
        found = source.pairs(prompts, groups, verdicts, step)
        assert all(p.chosen.token_ids[:2].tolist() == [5, 0] for p in found)
        return [(p.chosen.token_ids[2], p.rejected.token_ids[2]) for p in found]

    assert drawn(9) == [(10, 11), (12, 11)]
    assert drawn(1) == drawn(1)
    assert {drawn(1, step)[0] for step in range(9)} == {(10, 11), (12, 11)}


def test_a_run_trains_its_reward_model_and_goes_on_where_it_was_stopped(folder, reward_model):
    reward_model()
    run(settings(folder, "--output_dir", "whole", "--steps", "5"))
    table = rows(folder, "whole")
    due = [row for row in table if "reward_model/loss" in row]
    assert [row["step"] for row in due] == [2, 4]
    assert due[0]["reward_model/replayed"] == 0 < due[1]["reward_model/replayed"]
    # the labels are measured, and the reward is the model's alone
    assert all(row["reward/mean"] == row["reward/model"] for row in table if row["step"])
    assert all(0 <= row["reward/token_rewards:low"] <= 1 for row in table if row["step"])
    (kept,) = (folder / "whole/reward_model").iterdir()
    assert kept.name == "step-000004"
    model = AutoModelForSequenceClassification.from_pretrained(kept)
    assert model.config.reward_bias == due[1]["reward_model/bias"]
    before = AutoModelForSequenceClassification.from_pretrained("rm")
    assert not torch.equal(model.score.weight, before.score.weight)
    # after three steps a pair waits, after four the older ones do
    for stop in (3, 4):
        train(folder, *SETTINGS, "--steps", str(stop))
        train(folder, *SETTINGS, "--steps", "5", "--resume")
        assert rows(folder) == table
        shutil.rmtree(folder / "out")


def test_what_a_reward_model_cannot_learn_is_refused(folder, reward_model):
    reward_model()
    reward_model("other")
    for overrides, message in (
        (["--reward_model.labels", "algorithm"], "trains its reward model, rm: name the source"),
        (["--reward_model.labels", "model:rm"], "needs one model:DIR .* found none"),
        (["--reward_model.labels", "2 * math"], "a weight has no effect"),
        (["--reward_model.labels", "nonsense"], "reward_model.labels: 'nonsense': wanted module:"),
        (["--reward.sources", "math"], "needs one model:DIR among reward.sources .* found none"),
        (["--reward.sources", "model:rm", "model:other"], "found rm, other"),
        (["--loss.reference_every_steps", "0"], "never renews its reference .*: give a number"),
        (["--reward_model.every_steps", "9"], "would learn every 9 steps .* and steps = 4"),
        (["--update.token_budget", "69"], "cannot hold a pair .*: raise it to 70, rollout"),
        (["--rollout.group_size", "1", "--algorithm", "reinforce"], "learns from completions of"),
        (["--reward_model.labels", "none"], "reward_model.pairs_per_step = 9 has no effect"),
    ):
        given = [*SETTINGS, *overrides]
        if "reinforce" in given:
            given += ["--loss.kl_coef", "0.1", "--reward_model.every_steps", "2"]
        with pytest.raises(ConfigError, match=message):
            load_config(folder / "config.yaml", given)
    plain = ["--sampler", "transformers"]
    with pytest.raises(ConfigError, match="labels = 'none' has no effect: algorithm = 'grpo'"):
        load_config(folder / "config.yaml", [*plain, "--reward_model.labels", "none"])


def test_the_source_of_labels_is_opened_once(folder, reward_model):
    reward_model()
    for sources, opened in (
        (["model:rm"], ("model:rm", "0 * math")),
        (["model:rm", "0.5 * math"], ("model:rm", "0.5 * math")),
    ):
        config = settings(folder, "--reward_model.labels", "math", "--reward.sources", *sources)
        assert reward_sources(config) == opened
        training = reward_training(config, resolve(config))
        assert (training.model, training.labels, training.every_steps) == ("model", "math", 2)
    kept = [*("--sampler", "transformers", "--algorithm", "iterative_grpo", "--reward.sources")]
    config = load_config(
        folder / "config.yaml", [*kept, "model:rm", "--reward_model.labels", "none"]
    )
    assert reward_training(config, resolve(config)) is None


def test_room_for_a_checkpoint_counts_every_model_that_learns(folder, reward_model, monkeypatch):
    """What is asked for before the first step holds a checkpoint after it, and little more."""
    reward_model()
    config = settings(folder, "--algorithm", "ppo", "--reward_model.every_steps", "1")
    monkeypatch.setattr(RewardModelLearner, "_save", lambda *_: None)
    asked, made = [], rollouts()
    real = atomic.folder

    def folder_of(path, num_bytes):
        asked.append(num_bytes)
        return real(path, num_bytes)

    monkeypatch.setattr(atomic, "folder", folder_of)
    with build(config, Run(log=NoLog())) as (_, learner, _):
        parts = learner.stateful
        arguments = (config.output_dir, learner.model, learner.tokenizer)
        checkpoint.rehearse(*arguments, parameters=learner.stepped, parts=parts)
        learner.train_step([made.batch(range(len(made)))], 1, 0)
        learner.reward_model.update(1, PAIRS)
        saved = checkpoint.save(
            config.output_dir,
            step=1,
            model=learner.model,
            tokenizer=learner.tokenizer,
            parts=parts,
            keep=1,
            settings={},
        )
    taken = sum(file.stat().st_size for file in saved.iterdir())
    assert taken < asked[0] < taken + 2**20
    assert asked[0] == pytest.approx(asked[1], rel=0.01)
