"""The reference that becomes the policy every so many steps, and that of a resumed run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.runs import rows, train
from tests.torture.checkpoints import flip
from warpo.engine.config.policy import load_config
from warpo.engine.config.resolve import resolve
from warpo.engine.errors import CheckpointError, ConfigError
from warpo.engine.learner.reference import Reference
from warpo.engine.trainers.policy.train import run

# one optimizer step a step: until it, the policy is what the step began with
SETTINGS = (
    *("--sampler", "transformers", "--algorithm", "iterative_grpo", "--evaluation.every_steps"),
    *("0", "--update.epochs", "1", "--update.minibatches", "1", "--loss.kl_coef", "0.1"),
    *("--loss.reference_every_steps", "2", "--checkpoint.every_steps", "1"),
)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(a: Path, b: Path) -> bool:
    theirs = weights(b)
    return all(torch.equal(weight, theirs[name]) for name, weight in weights(a).items())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(folder: Path) -> Path:
    """A run of five steps whose reference was renewed after steps 2 and 4."""
    run(load_config(folder / "config.yaml", [*SETTINGS, "--output_dir", "whole", "--steps", "5"]))
    return folder


def test_the_reference_is_renewed_when_due_and_a_resumed_run_has_it(whole: Path) -> None:
    table = rows(whole, "whole")
    # k3 of a policy against itself is 0
    moved = [row["kl/ref"] > 1e-7 for row in table]
    assert moved == [False, True, False, True, False]
    out = whole / "whole"
    assert names(out / "checkpoints") == ["step-000004", "step-000005"]
    # what a run needs that resumes from step 3, the oldest when the last one was renewed
    assert names(out / "reference") == ["step-000002", "step-000004"]
    assert same(out / "reference/step-000004", out / "checkpoints/step-000004")
    assert not same(out / "reference/step-000004", out / "reference/step-000002")

    # between two renewals, and right after one
    for stop in (3, 4):
        train(whole, *SETTINGS, "--steps", str(stop))
        train(whole, *SETTINGS, "--steps", "5", "--resume")
        assert rows(whole) == table
        assert same(whole / "out/checkpoints/step-000005", out / "checkpoints/step-000005")
        shutil.rmtree(whole / "out")


def test_a_run_that_began_without_a_reference_has_none_to_resume_with(folder: Path) -> None:
    plain = ("--sampler", "transformers", "--algorithm", "dapo", "--evaluation.every_steps", "0")
    train(folder, *plain, "--loss.kl_coef", "0", "--steps", "1")
    with pytest.raises(ConfigError, match="no reference model of step 1 or before.*kl_coef must"):
        train(folder, *plain, "--loss.kl_coef", "0.1", "--steps", "2", "--resume")


def test_a_damaged_reference_is_refused(folder: Path) -> None:
    train(folder, *SETTINGS, "--steps", "1")
    flip(folder / "out/reference/step-000000/model.safetensors", random.Random(2))
    with pytest.raises(CheckpointError, match="model.safetensors.* without its reference model"):
        train(folder, *SETTINGS, "--steps", "2", "--resume")


def test_references_are_in_the_order_of_their_steps(folder: Path) -> None:
    config = load_config(folder / "config.yaml", ["--sampler", "transformers"])
    for step in (1_000_000, 0, 999_999):
        (folder / f"out/reference/step-{step:06d}").mkdir(parents=True)
    found = [path.name for path in Reference(config, resolve(config))._saved()]
    assert found == ["step-000000", "step-999999", "step-1000000"]
