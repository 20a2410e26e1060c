"""Mixtures of experts: every token's experts, in the order of the files, and no loss of routers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.engine.architectures import sequences
from tests.engine.random_models import CONFIGS
from tests.engine.runs import make_folder, rows, train
from tests.engine.tiny_models import tiny_config, tiny_model
from warpo.engine.config.policy import load_config
from warpo.engine.errors import SamplerError
from warpo.engine.models.architectures import refusal
from warpo.engine.preflight import check
from warpo.engine.preflight.invariance import LAYOUTS, divergences, load_cut_model
from warpo.engine.trainers.policy.train import run
from warpo.engine.types import TokenSequence
from warpo.kernels.objectives import OBJECTIVES

# Names of the checkpoint's tensors of expert i, the gate's, the up's and the down projection's.
FILES = {
    "qwen3_moe": "model.layers.1.mlp.experts.{i}.{part}_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.{i}.{part}.weight",
}
PARTS = {"qwen3_moe": ("gate", "up", "down"), "mixtral": ("w1", "w3", "w2")}
TRANSFORMERS = ("--sampler", "transformers", "--device", "cpu")


def make_model(model_type: str) -> PreTrainedModel:
    config = tiny_config(model_type)
    config.vocab_size = CONFIGS["qwen2"]().vocab_size
    return tiny_model(config)


@pytest.fixture(params=FILES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> Path:
    """A run as a user has it, of a tiny model of experts."""
    monkeypatch.chdir(make_folder(tmp_path))
    make_model(model_type).save_pretrained(tmp_path / "model")
    return tmp_path


def test_expert_i_of_the_files_is_expert_i_of_the_model(run_folder: Path, model_type: str) -> None:
    files = load_file(run_folder / "model/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "model")
    experts = model.model.layers[1].mlp.experts
    assert len(experts.gate_up_proj) == 4
    for i, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        gate, up, wanted = (
            files[FILES[model_type].format(i=i, part=part)] for part in PARTS[model_type]
        )
        assert torch.equal(gate_up, torch.cat([gate, up]))
        assert torch.equal(down, wanted)


def test_a_run_trains_every_expert_and_resumes_to_the_same_numbers(
    run_folder: Path, model_type: str
) -> None:
    whole = [*TRANSFORMERS, "--steps", "3", "--output_dir", "whole"]
    run(load_config(run_folder / "config.yaml", whole))
    train(run_folder, *TRANSFORMERS, "--steps", "2")
    assert train(run_folder, *TRANSFORMERS, "--steps", "3", "--resume") == rows(run_folder, "whole")
    weights = [
        load_file(run_folder / out / "checkpoints/step-000003/model.safetensors")
        for out in ("whole", "out")
    ]
    before = load_file(run_folder / "model/model.safetensors")
    assert before.keys() == weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    same = [name for name in before if torch.equal(before[name], weights[0][name])]
    assert not [name for name in same if "experts" in name or "gate" in name]


def test_every_layout_has_the_same_gradient(run_folder: Path) -> None:
    objectives = {"grpo": OBJECTIVES["grpo"]}
    given = [TokenSequence.of(ids[:n], ids[n:]) for ids, n in sequences()]
    model, cut = load_cut_model(str(run_folder / "model"), given, torch.device("cpu"))
    found = divergences(model, cut, objectives, temperature=1.0, max_new_tokens=27)
    assert {divergence.layout for divergence in found} == {*LAYOUTS}
    assert all(divergence.relative <= LAYOUTS[divergence.layout] for divergence in found)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["none", "block"])
def test_check_finds_the_gradient_of_each_layout(
    run_folder: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TRANSFORMERS, "--update.activation_checkpointing", setting]
    assert check.run(load_config(run_folder / "config.yaml", words)), capsys.readouterr().out


def test_a_loss_of_routers_is_refused(model_type: str) -> None:
    config = tiny_config(model_type)
    assert not refusal(config, 27)
    config.output_router_logits = True
    assert "output_router_logits is true" in refusal(config, 27)


def test_noise_of_routers_is_not_drawn() -> None:
    """Sampler and learner run in evaluation mode."""
    config = tiny_config("mixtral")
    model = tiny_model(config)
    ids = torch.arange(9)[None]
    plain = model(ids).logits
    config.router_jitter_noise = 0.5
    assert torch.equal(tiny_model(config)(ids).logits, plain)


def test_vllms_cpu_build_is_refused(run_folder: Path) -> None:
    with pytest.raises(SamplerError, match="is a mixture of experts: .*set sampler: transformers"):
        train(run_folder, "--sampler", "vllm", "--steps", "1")
