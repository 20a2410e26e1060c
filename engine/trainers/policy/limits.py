"""Settings of a run against its model and its machine, checked when the model's config is read and
before its weights are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from warpo.engine.config.policy import Config
from warpo.engine.config.samplers import SAMPLERS
from warpo.engine.errors import ConfigError
from warpo.engine.models.architectures import shape_model
from warpo.engine.models.files import max_positions
from warpo.engine.models.lora import targets_of
from warpo.engine.plan.kv_cache import GIB, kv_bytes_per_token
from warpo.engine.rollout.sampler.base import SamplerMemory, plan_sampler_memory
from warpo.engine.run.free_memory import free_memory


def check_limits(config: Config, hf_config: PretrainedConfig, device: torch.device) -> None:
    """Refuse what the model cannot do.

    Raises:
        ConfigError: max_model_len is beyond the model's positions, top_k keeps its whole
            vocabulary, or the KV cache is smaller than a sequence.
    """
    rollout, text = config.rollout, hf_config.get_text_config()
    positions = max_positions(text)
    if positions is not None and rollout.max_model_len > positions:
        raise ConfigError(
            f"rollout.max_model_len = {rollout.max_model_len} is beyond the {positions} positions "
            f"of {config.model}: lower it"
        )
    vocab_size = getattr(text, "vocab_size", None)
    if vocab_size is not None and rollout.top_k >= vocab_size:
        raise ConfigError(
            f"rollout.top_k = {rollout.top_k} has no effect: {config.model} has {vocab_size} "
            "tokens; set it to 0 to draw from all"
        )
    if memory := plan_sampler_memory(config, hf_config, device):
        _check_kv_cache(config, text, memory)


def check_adapters(config: Config, hf_config: PretrainedConfig) -> None:
    """Refuse adapters that the model's layers cannot have.

    Raises:
        ConfigError: see `targets_of`.
    """
    if config.lora.rank:
        targets_of(shape_model(hf_config, torch.device("meta")), config.lora)


def check_free_memory(config: Config, device: torch.device) -> None:
    """Refuse a KV cache that the machine cannot hold.

    Raises:
        ConfigError: it is larger than what is free.
    """
    free, size = free_memory(device), config.rollout.kv_cache_bytes
    if SAMPLERS[config.sampler].has_kv_cache and size > free:
        raise ConfigError(
            f"rollout.kv_cache_gib = {size / GIB:g} is more than the {free / GIB:.1f} GiB that "
            f"{device} has free: lower it"
        )


def _check_kv_cache(config: Config, text: Any, memory: SamplerMemory) -> None:
    rollout = config.rollout
    tokens = memory.cache_tokens(rollout.max_model_len)
    needed = tokens * kv_bytes_per_token(config.sampler_dtype, text) / GIB
    if rollout.kv_cache_bytes / GIB < needed:
        raise ConfigError(
            f"rollout.kv_cache_gib = {rollout.kv_cache_gib} cannot hold one sequence of "
            f"rollout.max_model_len = {rollout.max_model_len}, which takes {needed:.3g} GiB: raise "
            "the one or lower the other"
        )
