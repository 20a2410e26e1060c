"""Layers that run a second time in the backward pass: the same bits, and less memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine.architectures import sequences
from tests.engine.runs import rows
from tests.engine.tiny_models import tiny_config, tiny_model
from warpo.engine.config.policy import load_config
from warpo.engine.errors import ConfigError
from warpo.engine.models.attention import ATTENTION
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.checkpointing import checkpoint_layers, layers_of
from warpo.engine.models.model import (
    inputs_of,
    other_layers,
    predict,
    prepare,
    token_logprobs,
)
from warpo.engine.models.score import loss_and_gradient
from warpo.engine.trainers.policy.train import run
from warpo.engine.types import TokenSequence

# Plain attention, soft caps and windows, sinks and experts, experts, keys that layers share, state.
TYPES = ("qwen2", "gemma2", "gpt_oss", "qwen3_moe", "mixtral", "gemma3n_text", "mamba2", "jamba")


def two_models(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model as it is, and with its layers checkpointed."""
    plain = tiny_model(tiny_config(model_type))
    prepare(plain)
    plain.set_attn_implementation("eager" if other_layers(plain.config, type(plain)) else ATTENTION)
    twice = copy.deepcopy(plain)
    checkpoint_layers(twice, "block")
    return plain, twice


def packed() -> Batch:
    return pack([TokenSequence.of(ids[:n], ids[n:]) for ids, n in sequences()])


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("model_type", TYPES)
def test_logprobs_and_gradients_are_the_same_bits(model_type: str) -> None:
    plain, twice = two_models(model_type)
    wanted, found = (token_logprobs(m, packed(), 1.0).logprobs for m in (plain, twice))
    assert torch.equal(found, wanted)
    assert_equal(gradients(twice, found.sum()), gradients(plain, wanted.sum()))


def test_a_head_on_the_trunk_and_the_inputs_get_the_same_gradient() -> None:
    plain, twice = two_models("qwen2")
    head = torch.nn.Linear(128, 1)

    def loss(model: PreTrainedModel) -> Tensor:
        predictions, values = predict(model, packed(), head)
        logprobs = predictions.logprobs(packed().targets, 1.0).logprobs
        return logprobs.sum() + values.square().sum()

    assert_equal(gradients(twice, loss(twice)), gradients(plain, loss(plain)))
    ids = [ids for ids, _ in sequences()]
    assert torch.equal(loss_and_gradient(twice, ids), loss_and_gradient(plain, ids))


def test_a_layer_runs_twice_with_a_gradient_and_once_without() -> None:
    _, twice = two_models("qwen2")
    runs: list[int] = []
    for layer in layers_of(twice):
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    loss = token_logprobs(twice, packed(), 1.0).logprobs.sum()
    assert len(runs) == 4
    loss.backward()
    assert len(runs) == 8
    with torch.no_grad():
        token_logprobs(twice, packed(), 1.0)
    assert len(runs) == 12


def test_a_layer_keeps_its_input_only() -> None:
    """Bytes that the graph holds for the backward pass, those of parameters left out."""

    def saved(model: PreTrainedModel) -> int:
        own = {parameter.data_ptr() for parameter in model.parameters()}
        held: dict[int, int] = {}

        def pack_hook(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            output = model.base_model(**inputs_of(model, packed())).last_hidden_state
        assert output.requires_grad
        return sum(held.values())

    plain, twice = two_models("qwen2")
    assert saved(twice) < saved(plain) / 5


def test_a_model_without_layers_to_run_again_is_refused() -> None:
    model = transformers.CTRLLMHeadModel(tiny_config("ctrl"))
    with pytest.raises(ConfigError, match="block': ctrl has no layers .*: set it to none"):
        checkpoint_layers(model, "block")
    checkpoint_layers(model, "none")
    checkpoint_layers(model, "auto")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--algorithm", "ppo", "--loss.kl_coef", "0.01"],
        ["--algorithm", "ppo", "--loss.kl_coef", "0.01", "--critic.model", "shared"],
    ],
    ids=["grpo", "ppo", "shared critic"],
)
def test_a_run_has_the_same_numbers(folder: Path, overrides: list[str]) -> None:
    found = []
    for name in ("none", "block"):
        out = ["--output_dir", str(folder / name), "--update.activation_checkpointing", name]
        run(
            load_config(
                folder / "config.yaml",
                ["--sampler", "transformers", "--steps", "2", *overrides, *out],
            )
        )
        weights = folder / name / "checkpoints/step-000002/model.safetensors"
        found.append((rows(folder, name), weights.read_bytes()))
    assert found[0] == found[1]
