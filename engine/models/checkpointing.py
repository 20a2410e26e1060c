"""Activation checkpointing: a layer keeps only its input for the backward pass, which runs it a
second time (https://arxiv.org/abs/1604.06174).

The second run repeats the operations of the first, so gradients are bit for bit the same.
transformers' own switch acts in training mode alone, which other parts of a model read too; here a
model stays in evaluation mode.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from warpo.engine.errors import ConfigError


def checkpoint_layers(model: PreTrainedModel, setting: Literal["none", "block", "auto"]) -> None:
    """Checkpoint every layer of a model where update.activation_checkpointing is "block"; an "auto"
    that nobody has settled is "none".

    Raises:
        ConfigError: transformers does not say what its layers are.
    """
    if setting != "block":
        return
    layers = layers_of(model)
    if not layers:
        raise ConfigError(
            f"update.activation_checkpointing = 'block': {model.config.model_type} has no layers "
            "that transformers can run a second time: set it to none"
        )
    classes = {cls: _checkpointed(cls) for cls in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that transformers declares fit to be run a second time."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def _checkpointed(cls: Any) -> type[nn.Module]:
    """A class of layers as `cls`, whose forward pass keeps its input only."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        # Nothing is drawn in a layer: dropout is taken out when a model is loaded.
        return checkpoint(
            cls.forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return type(cls.__name__, (cls,), {"forward": forward})
