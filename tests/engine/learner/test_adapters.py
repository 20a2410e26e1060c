"""Adapters merged into the weights: rounded once, proven, and in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.random_models import new_learner
from warpo.engine.config.lora import LoraSettings
from warpo.engine.errors import CheckpointError, WeightMismatch
from warpo.engine.learner import adapters as module
from warpo.engine.learner.adapters import Adapters
from warpo.kernels import ops


def new_adapters(dtype: torch.dtype = torch.float32, std: float = 0.02) -> Adapters:
    model = new_learner("qwen2").to(dtype)
    adapters = Adapters(model, LoraSettings(rank=4, alpha=8), seed=0, path="models/base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.adapter.b.normal_(std=std, generator=generator)
    return adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [module.TILE, 1000], ids=["whole", "tiles"])
def test_a_merge_is_rounded_once_and_tells_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile: int
) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    adapters = new_adapters(dtype)
    before = {name: layer.weight.clone() for name, layer in adapters.layers.items()}
    update = adapters.merge()
    changed, moved = 0, 0.0
    for name, layer in adapters.layers.items():
        adapter = layer.adapter
        product = adapter.scale * adapter.b.detach().double() @ adapter.a.detach().double()
        exact = adapter.base.double() + product
        assert torch.equal(adapter.base, before[name])
        if dtype == torch.bfloat16:
            assert (layer.weight != exact.to(dtype)).float().mean() < 1e-3
        else:
            torch.testing.assert_close(layer.weight.double(), exact, rtol=2e-7, atol=1e-8)
        assert update.fingerprints[f"{name}.weight"] == ops.fingerprint(layer.weight)
        changed += int((layer.weight != before[name]).sum())
        moved += float(product.abs().sum())
    assert (int(update.changed), update.total) == (changed, sum(x.numel() for x in before.values()))
    assert float(update.master_update) == pytest.approx(moved, rel=1e-5)
    assert update.fingerprints.keys() == adapters.fingerprints.keys()


def test_adapters_that_have_not_learned_leave_the_weights_as_they_are() -> None:
    adapters = new_adapters(std=0.0)
    before = dict(adapters.fingerprints)
    assert int(adapters.merge().changed) == 0
    assert adapters.fingerprints == before


def test_a_small_step_is_lost_to_rounding_in_bfloat16_and_told() -> None:
    for dtype, kept in ((torch.float32, 0.999), (torch.bfloat16, 0.5)):
        update = new_adapters(dtype, std=1e-5).merge()
        share = float(update.published_update / update.master_update)
        assert share >= kept if dtype == torch.float32 else 0 < share < kept


def test_a_base_that_was_written_to_is_named() -> None:
    adapters = new_adapters()
    adapters.check_base()
    adapters.layers["model.layers.1.mlp.up_proj"].adapter.base[0, 0] += 1e-3
    with pytest.raises(WeightMismatch, match="base weight of model.layers.1.mlp.up_proj is not"):
        adapters.check_base()


def test_adapters_of_another_base_are_refused() -> None:
    record = new_adapters().record
    state = record.state_dict()
    record.load_state_dict(dict(state))
    state["model.norm.weight"] += 1
    with pytest.raises(CheckpointError, match="another base: model.norm.weight of model is not"):
        new_adapters().record.load_state_dict(state)


def test_the_folder_is_that_of_peft(tmp_path: Path) -> None:
    adapters = new_adapters()
    adapters.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    down = "base_model.model.model.layers.0.mlp.down_proj"
    assert tensors[f"{down}.lora_A.weight"].shape == (4, 160)
    assert tensors[f"{down}.lora_B.weight"].shape == (128, 4)
    assert torch.equal(
        tensors[f"{down}.lora_B.weight"], adapters.layers["model.layers.0.mlp.down_proj"].adapter.b
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert config["base_model_name_or_path"] == "models/base"
    assert config["target_modules"] == sorted(adapters.layers)
