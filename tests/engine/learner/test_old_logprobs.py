"""A step of one optimizer step scores nothing beforehand: its update computes old_logprobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from tests.engine.runs import train
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.policy import load_config
from warpo.engine.config.resolve import resolve
from warpo.engine.errors import ConfigError
from warpo.engine.learner import learner
from warpo.engine.learner.old_logprobs import are_the_updates
from warpo.engine.rollout.sampler.hf_sampler import TransformersSampler
from warpo.kernels.preferences import Preference

ONE_UPDATE = ("--update.epochs", "1", "--update.minibatches", "1")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = Qwen2ForCausalLM.from_pretrained(folder / "out/checkpoints/step-000002")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("--algorithm", "grpo"), id="grpo"),
        pytest.param(
            ("--algorithm", "gspo", "--loss.correction", "truncate_token"), id="corrected"
        ),
        pytest.param(("--algorithm", "ppo", "--loss.kl_coef", "0"), id="critic"),
        pytest.param(("--rollout.top_k", "5", "--loss.correction", "mask_token"), id="truncated"),
    ],
)
def test_the_run_is_that_of_old_logprobs_by_a_forward_pass_of_the_learner(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    words = [*("--sampler", "transformers", "--steps", "2"), *ONE_UPDATE, *settings]
    words += ["--evaluation.every_steps", "0"]
    found = train(folder, *words)
    by_update = weights(folder)
    assert all(row["old_logprobs/recomputed"] == 0 == row["kl/approx"] for row in found)
    monkeypatch.setattr(learner, "are_the_updates", lambda *args: False)
    monkeypatch.setattr(learner, "sampler_serves", lambda *args: False)
    shutil.rmtree(folder / "out")
    again = train(folder, *words)
    for name, expected in weights(folder).items():
        torch.testing.assert_close(by_update[name], expected, rtol=0, atol=1e-6, msg=name)
    for row, other in zip(found, again, strict=True):
        assert other["old_logprobs/recomputed"] == 1
        for name in ("loss/policy", "grad_norm", "mismatch/truncation_mean", "correction/mean"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_nothing_is_scored_before_the_update(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = Qwen2ForCausalLM.forward, list[bool]()

    def counted(self: Qwen2ForCausalLM, *args: object, **options: object) -> object:
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **options)

    generate = TransformersSampler.generate

    def draws(self: TransformersSampler, *args: object) -> object:
        found = generate(self, *args)
        calls.clear()
        return found

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", counted)
    monkeypatch.setattr(TransformersSampler, "generate", draws)
    seen = []
    take = learner.Learner.train_step

    def watched(self: learner.Learner, *args: object) -> object:
        before = list(calls)
        result = take(self, *args)
        seen.append((before, list(calls)))
        return result

    monkeypatch.setattr(learner.Learner, "train_step", watched)
    train(
        folder,
        *("--sampler", "transformers", "--steps", "1", "--evaluation.every_steps", "0"),
        *("--loss.kl_coef", "0", *ONE_UPDATE),
    )
    ((before, after),) = seen
    assert before == [] != after and all(after)


def test_old_logprobs_that_something_reads_before_are_computed_before(folder: Path) -> None:
    """Every row: what it refuses says so, and the others know where old_logprobs are read."""
    computed_before = set()
    for name, row in ALGORITHMS.items():
        if row.family != "policy":
            continue
        try:
            config = load_config(folder / "config.yaml", ["--algorithm", name, *ONE_UPDATE])
            algorithm = resolve(config)
        except ConfigError:
            continue
        if not are_the_updates(config, algorithm, 0):
            computed_before.add(name)
            reads = algorithm.needs_old_logprobs or isinstance(algorithm.objective, Preference)
            assert reads or algorithm.objective is None, name
    assert {"clip_cov", "off_policy_causal"} <= computed_before
    assert not {"grpo", "dapo", "gspo"} & computed_before
    several = load_config(folder / "config.yaml", ["--update.epochs", "2"])
    assert not are_the_updates(several, resolve(several), 0)
    words = ["--algorithm", "ppo", "--critic.warmup_steps", "3", *ONE_UPDATE]
    warmed = load_config(folder / "config.yaml", words)
    algorithm = resolve(warmed)
    if not algorithm.needs_old_logprobs:
        assert [are_the_updates(warmed, algorithm, step) for step in (2, 3)] == [False, True]
