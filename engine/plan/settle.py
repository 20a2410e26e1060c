"""Settings that are left to the machine: `auto` becomes a value before a run opens, so that its
config.yaml has what was decided and a run that resumes says where it is not the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import ValidationError

from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import Config
from warpo.engine.config.samplers import SAMPLERS
from warpo.engine.errors import ConfigError
from warpo.engine.plan.kv_cache import CPU_GIB, GIB, auto_kv_cache
from warpo.engine.plan.memory import plan_memory, resync_of
from warpo.engine.run.device import learner_device
from warpo.engine.run.free_memory import free_memory

T = TypeVar("T", Config, OfflineConfig)


class Settled(NamedTuple):
    """A setting that was `auto`, its value, and why, where the kind of device does not say."""

    key: str
    value: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.key} = {self.value}" + (f" ({self.why})" if self.why else "")


def settle(config: Config) -> tuple[Config, str]:
    """The config with a value for each `auto` that the machine decides, and a line that says which;
    empty where there is none.

    The plan knows no data: prompts of one token and of rollout.max_model_len -
    rollout.max_new_tokens.

    Raises:
        ConfigError: with these values the config cannot run.
    """
    config, settled = settle_update(config, step_peak)
    if config.rollout.kv_cache_gib == "auto":
        device, size = learner_device(config), CPU_GIB
        if SAMPLERS[config.sampler].has_kv_cache:
            free = free_memory(device)
            size = auto_kv_cache(config, device, free)
            why = f"{free / GIB:.1f} GiB are free" if device.type == "cuda" else ""
            settled.append(Settled("rollout.kv_cache_gib", f"{size:g}", why))
        config = replace(config, rollout=replace(config.rollout, kv_cache_gib=size))
    return config, told(config, settled)


def settle_update(config: T, peak_of: Callable[[T, torch.device], int]) -> tuple[T, list[Settled]]:
    """dtype and update.activation_checkpointing.

    Args:
        peak_of: bytes at the peak of the largest step that a config allows.
    """
    settled: list[Settled] = []
    device = learner_device(config)
    if config.dtype == "auto":
        config = _with_dtype(config, dtype_for(device.type))
        settled.append(Settled("dtype", config.dtype))
    if config.update.activation_checkpointing == "auto":
        config, why = _with_checkpointing(config, "none"), ""
        if device.type == "cuda":
            peak, free = peak_of(config, device), free_memory(device)
            config = _with_checkpointing(config, checkpointing_for(device.type, peak, free))
            why = f"without it a step takes {peak / GIB:.1f} of {free / GIB:.1f} GiB"
        chosen = config.update.activation_checkpointing
        settled.append(Settled("update.activation_checkpointing", chosen, why))
    return config, settled


def told(config: Config | OfflineConfig, settled: list[Settled]) -> str:
    """Those decisions in a line."""
    return f"auto on {learner_device(config)}: {', '.join(map(str, settled))}" if settled else ""


def dtype_for(kind: str) -> Literal["float32", "bfloat16"]:
    """The type of weights that a kind of device computes fastest with."""
    return "bfloat16" if kind == "cuda" else "float32"


def checkpointing_for(kind: str, peak: int, free: int) -> Literal["none", "block"]:
    """Checkpoint the layers where a step that keeps all activations does not fit a GPU.

    Args:
        kind: type of the device.
        peak: bytes that a step without it takes.
        free: bytes that the run may take there.
    """
    return "block" if kind == "cuda" and peak > free else "none"


def step_peak(config: Config, device: torch.device) -> int:
    """Bytes at the peak of the largest step that a config allows, without a KV cache where its size
    is not settled.
    """
    lengths = sorted({1, config.max_prompt_tokens})
    return plan_memory(config, lengths, device, resync_of(config)).peak


def _with_dtype(config: T, value: Literal["float32", "bfloat16"]) -> T:
    try:
        return replace(config, dtype=value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"dtype = 'auto' is {value} here: {reason}") from None


def _with_checkpointing(config: T, value: Literal["none", "block"]) -> T:
    return replace(config, update=replace(config.update, activation_checkpointing=value))
