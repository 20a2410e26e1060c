"""Whole runs whose policy learns by adapters, on the real samplers; faults planted in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.engine.random_models import new_learner
from tests.engine.runs import rows, train
from warpo.engine.config.policy import load_config
from warpo.engine.errors import CheckpointError, ConfigError, WeightMismatch
from warpo.engine.learner import adapters
from warpo.engine.learner.adapters import Adapters
from warpo.engine.models import head
from warpo.engine.run import manifest
from warpo.engine.trainers.policy import build

LORA = ("--lora.rank", "4", "--update.lr", "1e-2")
ONE_STEP = ("--update.epochs", "1", "--update.minibatches", "1", "--evaluation.every_steps", "0")


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"out/checkpoints/step-{step:06d}/adapter_model.safetensors")


def test_a_resumed_run_has_the_numbers_of_the_whole_one(folder: Path, kind: str) -> None:
    settings = ("--sampler", kind, *LORA)
    whole = train(folder, *settings)
    kept = tensors(folder, 4)
    assert not (folder / "out/reference").exists()
    assert not (folder / "out/checkpoints/step-000004/model.safetensors").exists()
    transformers.AutoTokenizer.from_pretrained(folder / "out/checkpoints/step-000004")
    last = whole[-1]
    assert last["publish/bytes"] == last["publish/extra_weight_bytes"] == 0
    assert last["mismatch/sampling_max"] < 1e-4 and last["update/changed_frac"] > 0.9
    assert last["kl/ref"] > 0
    (folder / "out").rename(folder / "whole")
    train(folder, *settings, "--steps", "2")
    train(folder, *settings, "--resume")
    assert rows(folder) == whole
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors(folder, 4).items())


@pytest.mark.parametrize(
    "settings",
    [
        ("--resync", "copy"),
        ("--rollout.dtype", "bfloat16"),
        ("--dtype", "bfloat16", "--update.optimizer_state", "host", "--lora.base", "host"),
        ("--update.activation_checkpointing", "block", "--lora.targets", r".*\.mlp\..*"),
        ("--lm_head_dtype", "float32", "--dtype", "bfloat16"),
        ("--algorithm", "ppo", "--critic.model", "shared"),
        ("--algorithm", "ppo", "--critic.model", "policy"),
    ],
    ids=lambda settings: " ".join(settings[:2]),
)
def test_runs_with_other_settings(folder: Path, settings: tuple[str, ...]) -> None:
    table = train(folder, "--sampler", "transformers", *LORA, *settings, "--steps", "2")
    assert [row["step"] for row in table][-2:] == [1, 2]
    assert table[-1]["update/changed_frac"] > 0.1
    assert "adapters" in torch.load(folder / "out/checkpoints/step-000002/trainer.pt")["parts"]


def test_the_reference_is_the_start(folder: Path) -> None:
    """With one optimizer step in a step the first is taken at the reference itself."""
    table = train(folder, "--sampler", "transformers", *LORA, *ONE_STEP, "--steps", "2")
    assert abs(table[0]["kl/ref"]) < 1e-9 < 1e-4 < table[1]["kl/ref"]


def test_a_head_that_stays_is_fused_with_its_losses_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--sampler", "transformers", *LORA, "--evaluation.every_steps", "0", "--steps", "2")
    made = train(folder, *settings)
    (folder / "out").rename(folder / "made")
    monkeypatch.setattr(head, "LOGITS_BYTES", 0)
    fused = train(folder, *settings)
    for name in ("grad_norm", "kl/ref", "reward/mean", "entropy/mean"):
        assert [row[name] for row in fused] == pytest.approx([row[name] for row in made], rel=1e-3)


@pytest.mark.parametrize("mode", ["alias", "copy"])
def test_a_merge_that_does_not_arrive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    write, count = adapters._write, iter(range(99))

    def lose(weight: torch.Tensor, merged: torch.Tensor) -> None:
        if next(count) != 14 + 3:
            write(weight, merged)

    monkeypatch.setattr(adapters, "_write", lose)
    with pytest.raises(
        WeightMismatch, match="does not hold the (weights that were published|merged weight of)"
    ):
        train(folder, "--sampler", "transformers", "--resync", mode, *LORA, *ONE_STEP)


def test_a_base_that_is_overwritten_is_not_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Adapters.merge

    def overwrite(self: Adapters) -> object:
        layer = self.layers["model.layers.0.mlp.up_proj"]
        layer.adapter.base.copy_(layer.weight)
        return merge(self)

    monkeypatch.setattr(Adapters, "merge", overwrite)
    with pytest.raises(WeightMismatch, match="base weight of model.layers.0.mlp.up_proj is not"):
        train(folder, "--sampler", "transformers", *LORA, "--steps", "2")
    saved = [path.name for path in (folder / "out/checkpoints").iterdir()]
    assert saved == ["step-000000"]


def test_a_run_goes_on_with_its_own_base_and_adapters_only(folder: Path) -> None:
    settings = ("--sampler", "transformers", *LORA, "--evaluation.every_steps", "0")
    train(folder, *settings, "--steps", "1")
    for change in (("--lora.rank", "0"), ("--lora.alpha", "3"), ("--lora.targets", ".*mlp.*")):
        with pytest.raises(ConfigError, match=f"{change[0][2:]} = .*it cannot be changed"):
            train(folder, *settings, *change, "--steps", "2", "--resume")
    base = new_learner("qwen2")
    with torch.no_grad():
        base.model.norm.weight.add_(1e-3)
    base.save_pretrained(folder / "model")
    with pytest.raises(CheckpointError, match="another base: model.norm.weight of model is not"):
        train(folder, *settings, "--steps", "2", "--resume")


def test_a_checkpoint_of_before_there_were_adapters_goes_on(folder: Path) -> None:
    settings = ("--sampler", "transformers", "--evaluation.every_steps", "0")
    train(folder, *settings, "--steps", "1")
    path = folder / "out/checkpoints/step-000001/manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"], body["settings"]["lora"]
    path.write_text(json.dumps(body | {"sha256": manifest._digest(body)}))
    assert [row["step"] for row in train(folder, *settings, "--steps", "2", "--resume")] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--lora.alpha", "3"), r"lora.alpha = 3.0 has no effect: lora.rank is 0"),
        (("--lora.base", "host"), r"lora.base = 'host' has no effect: lora.rank is 0"),
        (("--lora.rank", "4", "--lora.targets", "("), r"lora.targets = '\(' is not a regular exp"),
        (
            ("--lora.rank", "4", "--loss.reference_every_steps", "2"),
            r"loss.reference_every_steps = 2 of algorithm = 'grpo' does not go with lora.rank = 4",
        ),
    ],
)
def test_settings_that_are_refused(folder: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(folder / "config.yaml", settings)


def test_targets_are_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_model", None)
    with pytest.raises(ConfigError, match="lora.rank = 65 is above the 64 of"):
        train(folder, "--sampler", "transformers", "--lora.rank", "65")
