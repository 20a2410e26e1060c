"""Linear layers with low-rank adapters that are merged into their weights.

    W = round(W0 + s B A),   y = x W^T + bias,   s = alpha / rank
    dA = s (dy B)^T x,   dB = s dy^T (x A^T),   dx = dy W

W0 and the bias stay, A and B learn. The forward pass reads W, whose bits are the sampler's, so
adapters cost it nothing; the backward pass makes no product of W's size, and rounding is taken for
the identity.

Source: Hu et al., "LoRA", https://arxiv.org/abs/2106.09685; A starts as in PEFT, B at 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from warpo.engine.config.lora import ALL_LINEAR, LoraSettings
from warpo.engine.errors import ConfigError
from warpo.engine.models.linear import Linear, linear


@dataclass(eq=False, kw_only=True, slots=True)
class Adapter:
    """What a layer has besides its weight W (out, in).

    Attributes:
        a, b: (rank, in) and (out, rank) float32, which learn.
        scale: s.
        base: W0, in W's dtype.
        computes_base: returns True while the layer is to compute with W0 instead of W.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    base: Tensor
    computes_base: Callable[[], bool]


class _Merged(torch.autograd.Function):
    """`linear` of a weight that stays, with the gradients of the factors that it was made of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.t())
        if ctx.needs_input_grad[3]:
            grad_a = ((grad @ b.to(grad.dtype)).t() @ x).float().mul_(ctx.scale)
        if ctx.needs_input_grad[4]:
            grad_b = (grad.t() @ (x @ a.to(x.dtype).t())).float().mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


class LoraLinear(Linear):
    """A layer with an adapter; the class of a model's own layers is replaced by it.

    Its parameters are those of the layer without: those of the adapter are no part of the module,
    since what the sampler reads is W.
    """

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        if adapter.computes_base():
            return linear(x, adapter.base.to(x.device), self.bias)
        if not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        # Only rows: a view made in a Function cannot be changed in place.
        rows = _Merged.apply(
            x.flatten(0, -2), self.weight, self.bias, adapter.a, adapter.b, adapter.scale
        )
        return rows.unflatten(0, x.shape[:-1])


def adapter_tensors(model: nn.Module) -> Iterator[Tensor]:
    """A and B of every layer that has an adapter, and its W0."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            yield from (module.adapter.a, module.adapter.b, module.adapter.base)


def targets_of(model: PreTrainedModel, settings: LoraSettings) -> dict[str, nn.Linear]:
    """The layers that get adapters, by name.

    Raises:
        ConfigError: there are none, or lora.targets matches the head, a layer whose weight another
            module has too, or one that is narrower than the rank.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Linear) and module is not head
    }
    if settings.targets != ALL_LINEAR:
        _check_head(model, head, settings)
        linears = {n: x for n, x in linears.items() if re.fullmatch(settings.targets, n)}
    if not linears:
        raise ConfigError(
            f"lora.targets = {settings.targets!r} matches no linear layer of the model: give a "
            "regular expression of whole names, such as model.layers.0.self_attn.q_proj"
        )
    for name, module in linears.items():
        narrow = min(module.weight.shape)
        if settings.rank > narrow:
            raise ConfigError(
                f"lora.rank = {settings.rank} is above the {narrow} of {name} "
                f"{tuple(module.weight.shape)}: lower it, or leave the layer out of lora.targets"
            )
    _check_shared(model, linears)
    return linears


def _check_head(model: PreTrainedModel, head: Any, settings: LoraSettings) -> None:
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is not None and re.fullmatch(settings.targets, name):
        raise ConfigError(
            f"lora.targets = {settings.targets!r} matches the head {name}, which gets no adapter: "
            "leave it out"
        )


def _check_shared(model: PreTrainedModel, targets: dict[str, nn.Linear]) -> None:
    """An adapter would move the other module of a tied weight as well."""
    weights = {id(module.weight): name for name, module in targets.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = weights.get(id(parameter))
        if owner is not None and name != f"{owner}.weight":
            raise ConfigError(
                f"lora.targets matches {owner}, whose weight is that of {name} too: leave it out"
            )


def attach(
    model: PreTrainedModel,
    settings: LoraSettings,
    *,
    seed: int,
    computes_base: Callable[[], bool],
) -> dict[str, LoraLinear]:
    """Give the target layers adapters, whose W is W0 as yet, and let nothing else of the model
    learn; returns these layers by name.

    To be called when the parameters lie where they stay.

    Raises:
        ConfigError: see `targets_of`.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for name, module in targets_of(model, settings).items():
        weight = module.weight
        a = torch.empty(settings.rank, weight.shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        module.__class__ = LoraLinear
        assert isinstance(module, LoraLinear)
        module.adapter = Adapter(
            a=nn.Parameter(a.to(weight.device)),
            b=nn.Parameter(torch.zeros(weight.shape[0], settings.rank, device=weight.device)),
            scale=settings.alpha / settings.rank,
            base=_kept(weight.detach(), settings),
            computes_base=computes_base,
        )
        layers[name] = module
    return layers


def _kept(weight: Tensor, settings: LoraSettings) -> Tensor:
    """A copy of W0 where lora.base says."""
    if settings.base == "device" or weight.device.type == "cpu":
        return weight.clone(memory_format=torch.contiguous_format)
    copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.device.type == "cuda")
    return copy.copy_(weight)
