"""Settings that are left to the machine: `auto` becomes a value before a run opens, so that its
config.yaml has what was decided and a run that resumes says where it is not the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

import torch

from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import Config
from warpo.engine.preflight.memory import MIB, plan_memory, resync_of
from warpo.engine.preflight.offline_memory import offline_peak
from warpo.engine.run.device import learner_device
from warpo.engine.run.free_memory import free_memory

T = TypeVar("T", Config, OfflineConfig)


def settle(config: T) -> tuple[T, list[str]]:
    """The config with a value for update.activation_checkpointing = auto, and a line for each
    decision that is not the one of a CPU.

    The plan knows no data: prompts of one token and of rollout.max_model_len -
    rollout.max_new_tokens, or examples whose tokens are all learned.
    """
    if config.update.activation_checkpointing != "auto":
        return config, []
    device, plain = learner_device(config), _with_checkpointing(config, "none")
    if device.type == "cpu":
        return plain, []
    peak, free = step_peak(plain, device), free_memory(device)
    chosen = checkpointing_for(device.type, peak, free)
    line = (
        f"update.activation_checkpointing: {chosen}; without it a step takes at most "
        f"{peak / MIB:.0f} MiB, and {device} has {free / MIB:.0f} free"
    )
    return _with_checkpointing(config, chosen), [line]


def checkpointing_for(kind: str, peak: int, free: int) -> Literal["none", "block"]:
    """Checkpoint the layers where a step that keeps all activations does not fit a GPU.

    Args:
        kind: type of the device.
        peak: bytes that a step without it takes.
        free: bytes that the run may take there.
    """
    return "block" if kind == "cuda" and peak > free else "none"


def step_peak(config: Config | OfflineConfig, device: torch.device) -> int:
    """Bytes at the peak of the largest step that a config allows."""
    if isinstance(config, OfflineConfig):
        return offline_peak(config, device)
    lengths = sorted({1, config.max_prompt_tokens})
    return plan_memory(config, lengths, device, resync_of(config)).peak


def _with_checkpointing(config: T, value: Literal["none", "block"]) -> T:
    return replace(config, update=replace(config.update, activation_checkpointing=value))
