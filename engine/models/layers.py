"""The layers of a model as an update runs them: compiled, and checkpointed."""

from __future__ import annotations

from typing import Literal, Protocol

from transformers import PreTrainedModel

from warpo.engine.models.checkpointing import checkpoint_layers
from warpo.engine.models.compiling import compile_layers


class LayerSettings(Protocol):
    """What the section `update` of every trainer says about layers."""

    @property
    def compile(self) -> bool: ...

    @property
    def activation_checkpointing(self) -> Literal["none", "block", "auto"]: ...


def prepare_layers(model: PreTrainedModel, settings: LayerSettings) -> None:
    """Let the layers of a model run as its section `update` says.

    Raises:
        ConfigError: they cannot.
    """
    if settings.compile:
        compile_layers(model)
    # Around what is compiled: its second run must be the first one's.
    checkpoint_layers(model, settings.activation_checkpointing)
