"""The KV cache: bytes of a token, and the size that rollout.kv_cache_gib = auto stands for."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PretrainedConfig

from warpo.engine.config.policy import Config
from warpo.engine.errors import ConfigError
from warpo.engine.models.files import read_config
from warpo.engine.plan.memory import plan_memory, resync_of
from warpo.engine.rollout.sampler.base import plan_sampler_memory

GIB = 2**30
CPU_GIB = 4.0
# Of what a GPU has free: CUDA's context, vLLM's graphs and workspaces, fragments.
MARGIN = 0.1
# What is left is rounded to this, so that a run that resumes finds the same.
QUANTUM_GIB = 0.25
PHASES_WITH_CACHE = ("load", "sample", "publish")


def auto_kv_cache(config: Config, device: torch.device, free: int) -> float:
    """GiB that rollout.kv_cache_gib = auto stands for, of `free` bytes of the device.

    Raises:
        ConfigError: the rest of a step leaves a GPU no room for it.
    """
    if device.type == "cpu":
        return CPU_GIB
    lengths = sorted({1, config.max_prompt_tokens})
    phases = plan_memory(config, lengths, device, resync_of(config)).phases
    taken = max(phases[name] for name in PHASES_WITH_CACHE)
    return cache_beside(taken, free, filled_bytes(config, read_config(config.model), device))


def cache_beside(taken: int, free: int, filled: int) -> float:
    """GiB of the KV cache on a GPU: (1 - MARGIN) free - taken, at most what can be filled.

    Args:
        taken: bytes that a step takes besides, while the cache is there.
        free: bytes that the device has.
        filled: bytes that a step fills at most; 0: not known.

    Raises:
        ConfigError: nothing is left.
    """
    quanta = math.floor(((1 - MARGIN) * free - taken) / GIB / QUANTUM_GIB)
    if filled:
        quanta = min(quanta, math.ceil(filled / GIB / QUANTUM_GIB))
    if quanta < 1:
        raise ConfigError(
            f"rollout.kv_cache_gib = 'auto': the GPU has {free / GIB:.1f} GiB free, and sampling "
            f"takes {taken / GIB:.1f} without a KV cache: set update.optimizer_state to host, or "
            "take a smaller model or a larger GPU"
        )
    return quanta * QUANTUM_GIB


def filled_bytes(config: Config, hf_config: PretrainedConfig, device: torch.device) -> int:
    """Bytes of the sequences that are sampled together, each of rollout.max_model_len tokens; 0
    where layers do not keep all of them.
    """
    memory = plan_sampler_memory(config, hf_config, device)
    if memory is None:
        return 0
    rollout, evaluation = config.rollout, config.evaluation
    asked = rollout.prompts_per_step * rollout.group_size
    if config.data.eval:
        asked = max(asked, evaluation.max_prompts * evaluation.samples)
    tokens = min(asked, memory.most_sequences) * memory.cache_tokens(rollout.max_model_len)
    return tokens * kv_bytes_per_token(config.sampler_dtype, hf_config.get_text_config())


def kv_bytes_per_token(dtype: str, text: Any) -> int:
    """Keys and values of all layers; 0 where some layers keep less."""
    if getattr(text, "kv_lora_rank", None) or getattr(text, "sliding_window", None):
        return 0
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        return 0
    try:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(2 * text.num_hidden_layers * heads * width) * (4 if dtype == "float32" else 2)
    except (AttributeError, TypeError, ZeroDivisionError):
        return 0  # not a model of attention layers
