"""A tiny random model of each causal language model that transformers has, by one recipe."""

from __future__ import annotations

import inspect

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Heads of 32: vLLM has no CPU attention kernel for heads of 16.
SIZES = {
    "vocab_size": 70,
    "vocab_size_per_layer_input": 70,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "hidden_size": 128,
    "d_model": 128,
    "n_embd": 128,
    "embedding_size": 128,
    "word_embed_proj_dim": 128,
    "attention_hidden_size": 128,
    "lru_width": 128,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "shared_intermediate_size": 32,
    "mlp_hidden_size": 96,
    "n_inner": 96,
    "dff": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "n_head": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 32,
    "rotary_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "qk_head_dim": 64,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    # shorter than the sequences
    "sliding_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "moe_intermediate_size_mlp": 32,
    "expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_d_head": 32,
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 16,
    "num_heads": 8,
    "n_groups": 1,
    "num_kv_shared_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
MAX_PARAMETERS = 8_000_000
# Wide enough that a model is sure of some tokens and its weights matter.
NOISE = 0.03

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's default config with the sizes above, and one layer of each kind at least.

    Raises:
        Exception: the recipe does not fit this type.
    """
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    names = {*vars(default), *default.attribute_map, *inspect.signature(cls.__init__).parameters}
    for base in cls.__mro__:
        names |= {*getattr(base, "__annotations__", {})}
    sizes: dict[str, object] = {name: size for name, size in SIZES.items() if name in names}
    if "qk_rope_head_dim" in names:
        sizes["head_dim"] = SIZES["qk_rope_head_dim"]
    heads = getattr(default, "num_attention_heads", 0)
    if getattr(default, "num_key_value_heads", None) == heads:
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    layers = getattr(default, "layer_types", None)
    name = cls.attribute_map.get("layer_types", "layer_types")
    if layers and not isinstance(getattr(cls, name, None), property):
        kinds = list(dict.fromkeys(layers))
        sizes["layer_types"] = (kinds * 4)[: max(4, len(kinds))]
        sizes["num_hidden_layers"] = len(sizes["layer_types"])  # type: ignore[arg-type]
    for part, part_cls in default.sub_configs.items():
        if hasattr(part_cls, "model_type") and part_cls.model_type in CONFIG_MAPPING:
            sizes[part] = tiny_config(part_cls.model_type).to_dict()
    return cls(**sizes)


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random float32 model with eager attention; every run makes the same one.

    Raises:
        Exception: the recipe does not fit this type.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters are not tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        for parameter in model.parameters():
            # biases and sinks start at 0, gains at 1
            parameter.data.add_(torch.randn_like(parameter), alpha=NOISE)
    return model.eval()
