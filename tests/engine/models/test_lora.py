"""Layers whose adapters are merged: their values, gradients, and which layers they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.random_models import new_learner
from warpo.engine.config.lora import LoraSettings
from warpo.engine.errors import ConfigError
from warpo.engine.models.lora import LoraLinear, adapter_tensors, attach, targets_of
from warpo.engine.models.model import prepare

SETTINGS = LoraSettings(rank=4, alpha=8)


def learner_with_adapters(settings: LoraSettings = SETTINGS, dtype: torch.dtype = torch.float32):
    model = new_learner("qwen2").to(dtype)
    prepare(model)
    layers = attach(model, settings, seed=0, computes_base=lambda: False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.adapter.b.normal_(std=0.02, generator=generator)
            merged = layer.adapter.scale * layer.adapter.b @ layer.adapter.a
            layer.weight.add_(merged)
    return model, layers


def formula(x: Tensor, layer: LoraLinear, a: Tensor, b: Tensor) -> Tensor:
    """In float64."""
    weight = layer.adapter.base.double() + layer.adapter.scale * b @ a
    return x @ weight.t() + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "down_proj"])
def test_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype, bound: float) -> None:
    """With a bias, without, and of more inputs than outputs."""
    _, layers = learner_with_adapters(dtype=dtype)
    layer = next(layer for full, layer in layers.items() if full.endswith(name))
    adapter = layer.adapter
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, layer.in_features, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, layer.out_features, generator=generator).to(dtype)
    learned = (x, adapter.a, adapter.b)
    exact = [tensor.detach().double().requires_grad_() for tensor in learned]
    y = layer(x)
    y.backward(grad)
    wanted = formula(exact[0], layer, exact[1], exact[2])
    wanted.backward(grad.double())
    gradients = [(t.grad, e.grad) for t, e in zip(learned, exact, strict=True)]
    for found, right in [(y, wanted), *gradients]:
        assert (found.double() - right).norm() <= bound * right.norm()
    assert adapter.a.grad.dtype == adapter.b.grad.dtype == torch.float32
    assert layer.weight.grad is None


def test_only_the_adapters_learn_and_the_module_keeps_its_parameters() -> None:
    plain = dict(new_learner("qwen2").named_parameters())
    model, layers = learner_with_adapters()
    assert dict(model.named_parameters()).keys() == plain.keys()
    assert model.state_dict().keys() == new_learner("qwen2").state_dict().keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(layers) == 14 and len(list(adapter_tensors(model))) == 3 * 14
    model(input_ids=torch.tensor([[2, 3, 4]])).logits.sum().backward()
    assert all(x.grad is not None for x in adapter_tensors(model) if x.requires_grad)


def test_layers_compute_with_their_base_bit_for_bit() -> None:
    ids, base = torch.tensor([[2, 3, 4, 9]]), False
    model = new_learner("qwen2")
    prepare(model)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        layers = attach(model, SETTINGS, seed=0, computes_base=lambda: base)
        assert torch.equal(model(input_ids=ids).logits, before)
        for layer in layers.values():
            layer.weight.mul_(1.5)
        assert not torch.allclose(model(input_ids=ids).logits, before)
        base = True
        assert torch.equal(model(input_ids=ids).logits, before)


def test_adapters_start_by_the_seed_only() -> None:
    def starts(seed: int) -> list[Tensor]:
        model = new_learner("qwen2")
        layers = attach(model, SETTINGS, seed=seed, computes_base=lambda: False)
        assert not any(layer.adapter.b.any() for layer in layers.values())
        return [layer.adapter.a for layer in layers.values()]

    torch.manual_seed(5)
    first = starts(0)
    assert all(torch.equal(a, b) for a, b in zip(first, starts(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, starts(1), strict=True))
    assert not torch.equal(first[0], first[7])


def test_targets() -> None:
    model = new_learner("qwen2-untied")
    assert "lm_head" not in targets_of(model, SETTINGS)
    found = targets_of(model, LoraSettings(rank=4, targets=r".*self_attn\.[qv]_proj"))
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "v_proj"] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "q_proj"}, "lora.targets = 'q_proj' matches no linear layer of the model"),
        ({"targets": ".*"}, "lora.targets = '.*' matches the head lm_head, which gets no adapter"),
        (
            {"rank": 65},
            r"lora.rank = 65 is above the 64 of .*layers.0.self_attn.k_proj \(64, 128\)",
        ),
    ],
)
def test_targets_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        targets_of(new_learner("qwen2"), LoraSettings(**{"rank": 4} | settings))


def test_a_weight_that_two_modules_have_is_refused() -> None:
    model = new_learner("qwen2")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match="up_proj, whose weight is that of .* too: leave it out"):
        targets_of(model, SETTINGS)
