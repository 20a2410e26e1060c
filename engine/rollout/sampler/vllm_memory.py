"""Memory of vLLM besides its weights and its KV cache, by formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from warpo.engine.config.policy import Config
from warpo.engine.models.architectures import cache_width
from warpo.engine.rollout.sampler.vllm_internals import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE

# What vLLM takes together at most where it is not told, tokens and sequences, LLM_CLASS of
# EngineArgs.get_batch_defaults; and the tokens of a block of its KV cache. On a CPU, on a GPU, and
# on one of 70 GiB or more.
_BATCH_LIMITS = {
    "cpu": (4096, 256, CPU_BLOCK_SIZE),
    "cuda": (8192, 256, GPU_BLOCK_SIZE),
    "large cuda": (16384, 1024, GPU_BLOCK_SIZE),
}


@dataclass(frozen=True, slots=True)
class VllmMemory:
    """A `SamplerMemory`."""

    config: Config
    hf_config: PretrainedConfig
    device: torch.device

    @property
    def most_sequences(self) -> int:
        """vLLM's own limit."""
        return _BATCH_LIMITS[_hardware(self.device)][1]

    def cache_tokens(self, tokens: int) -> int:
        """Whole blocks, and the one that vLLM keeps for itself."""
        block = CPU_BLOCK_SIZE if self.device.type == "cpu" else GPU_BLOCK_SIZE
        return (-(-tokens // block) + 1) * block

    def sampling_bytes(self, prompt_tokens: int) -> int:
        """The larger of

            decoding   S V (4 + 4 + 1): logits and logprobs in float32, and a byte for the rank of
                       the sampled token; on a GPU S V (4 + 4 + 4 + 4), with probabilities and
                       noise. S V bytes of logits in the sampler's own type more, where it is not
                       float32
            prefill    T (3 I + 3 H) in the sampler's type: both halves of the MLP's input and their
                       product, hidden states, residual and the attention's output

        for S sequences of vocabulary V and T tokens of width H and MLP width I that it takes
        together. Of a prompt's further completions T counts only the last, incomplete block of
        the KV cache.
        """
        model, rollout = self.hf_config.get_text_config(), self.config.rollout
        limit, sequences, block = _BATCH_LIMITS[_hardware(self.device)]
        sequences = min(sequences, rollout.prompts_per_step * rollout.group_size)
        cached = (prompt_tokens - 1) // block * block
        tokens = rollout.prompts_per_step * (
            prompt_tokens + (rollout.group_size - 1) * (prompt_tokens - cached)
        )
        if self.device.type == "cpu":
            limit = max(limit, rollout.max_model_len)  # it takes prompts whole
        tokens = min(limit, tokens)
        logits = 9 if self.device.type == "cpu" else 16
        if self._itemsize != 4:
            logits += self._itemsize
        decoding = sequences * model.vocab_size * logits
        prefill = tokens * 3 * (_mlp_width(model) + model.hidden_size) * self._itemsize
        return max(decoding, prefill)

    def probe_bytes(self, tokens: int) -> int:
        """Logprobs of a prompt, one prompt after the other: T V (4 + 4 + 4), its logits, its
        logprobs, and those of the prompt before, which are still there.
        """
        if not self.config.probe.num_sequences:
            return 0
        return 12 * tokens * int(self.hf_config.get_text_config().vocab_size)

    def probe_cache_bytes(self, tokens: int) -> int:
        """On a CPU only the pages that are written come back. A token takes the keys and values of
        all layers.
        """
        if self.device.type == "cuda":
            return 0
        blocks = self.config.probe.num_sequences * -(-tokens // CPU_BLOCK_SIZE)
        size = blocks * CPU_BLOCK_SIZE * cache_width(self.hf_config) * self._itemsize
        return min(size, self.config.rollout.kv_cache_bytes)

    @property
    def _itemsize(self) -> int:
        dtype: torch.dtype = getattr(torch, self.config.sampler_dtype)
        return dtype.itemsize


def _mlp_width(model: PretrainedConfig) -> int:
    """MLP width of the widest layer."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "mlp_hidden_size")
    widths = [width for name in names if (width := getattr(model, name, None))]
    width = widths[0] if widths else 4 * model.hidden_size
    return max(width) if isinstance(width, list | tuple) else int(width)


def _hardware(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    large = properties.total_memory >= 70 * 2**30 and "a100" not in properties.name.lower()
    return "large cuda" if large else "cuda"
