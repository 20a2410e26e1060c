"""Layers compiled by torch.compile: the results of eager ones, and no code made twice."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from tests.engine.runs import rows
from tests.engine.tiny_models import tiny_config, tiny_model
from warpo.engine.config.policy import load_config
from warpo.engine.errors import ConfigError
from warpo.engine.models import linear
from warpo.engine.models.attention import ATTENTION
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.compiling import compile_layers
from warpo.engine.models.model import prepare, token_logprobs
from warpo.engine.trainers.policy.train import run
from warpo.engine.types import TokenSequence


def packed_model(model_type: str) -> PreTrainedModel:
    model = tiny_model(tiny_config(model_type))
    prepare(model)
    model.set_attn_implementation(ATTENTION)
    return model


def batch(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 30, (n,), generator=generator).tolist() for n in lengths]
    return pack(
        [
            TokenSequence.of(ids[: n // 2], ids[n // 2 :])
            for ids, n in zip(drawn, lengths, strict=True)
        ]
    )


def step(model: PreTrainedModel, given: Batch) -> list[torch.Tensor]:
    """Logprobs without and with a gradient, and the whole gradient."""
    with torch.no_grad():
        scored = token_logprobs(model, given, 1.0).logprobs
    logprobs = token_logprobs(model, given, 1.0).logprobs
    found = torch.autograd.grad(logprobs.sum(), [*model.parameters()])
    return [scored, logprobs.detach(), torch.cat([gradient.flatten() for gradient in found])]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "onednn"), [("qwen2", False), ("gemma2", True)])
def test_results_are_those_of_eager_layers_and_code_is_made_once(
    model_type: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", onednn)
    torch._dynamo.reset()
    counters.clear()
    eager = packed_model(model_type)
    compiled = copy.deepcopy(eager)
    compile_layers(compiled)
    for lengths in ((9, 7, 12), (21, 5), (13, 13, 13, 40)):
        wanted, found = step(eager, batch(*lengths)), step(compiled, batch(*lengths))
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
        if lengths == (9, 7, 12):
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.slow
def test_a_run_with_compiled_and_checkpointed_layers_learns_what_one_without_does(
    folder: Path,
) -> None:
    words = ["--update.compile", "true", "--update.activation_checkpointing", "block"]
    run(load_config(folder / "config.yaml", words))
    plain = load_config(folder / "config.yaml", ["--output_dir", str(folder / "plain")])
    run(plain)
    steps = zip(rows(folder)[1:], rows(folder, "plain")[1:], strict=True)
    for one, other in steps:
        assert one["reward/mean"] == other["reward/mean"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba2", "no layers of attention"),
        ("ctrl", "no layers of attention"),
        ("mixtral", "tokens an expert of mixtral reads"),
    ],
)
def test_a_model_whose_layers_cannot_be_compiled_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*set it to false"):
        compile_layers(tiny_model(tiny_config(model_type)))


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match="finds no C.. compiler: install"):
        compile_layers(packed_model("qwen2"))
