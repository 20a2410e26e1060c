"""Small random models for the engine's tests, and what plain transformers says of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from torch import nn

from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.rollout.sampler.base import ColocatedSampler
from warpo.engine.types import Completion, TokenSequence
from warpo.engine.weights.resync import Resync

# Sampler against model, float32 forward passes batched and fused differently: 3e-6 was seen.
LOGPROB_ATOL = 1e-4

EOS_TOKEN_IDS = [1, 5]
MAX_MODEL_LEN = 192

# Heads of 32: vLLM has no CPU attention kernel for heads of 16.
COMMON = dict(
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # Wide enough that a model is sure of some tokens and its weights matter.
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
# vLLM pads a vocabulary to multiples of 64: 70 is padded, 64 is not.
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(vocab_size=64, tie_word_embeddings=True, **COMMON),
    "qwen2-untied": lambda: transformers.Qwen2Config(
        vocab_size=70, tie_word_embeddings=False, **COMMON
    ),
    "qwen2-tied-padded": lambda: transformers.Qwen2Config(
        vocab_size=70, tie_word_embeddings=True, **COMMON
    ),
    "llama": lambda: transformers.LlamaConfig(vocab_size=70, tie_word_embeddings=False, **COMMON),
    "qwen3": lambda: transformers.Qwen3Config(
        vocab_size=64, tie_word_embeddings=True, head_dim=32, **COMMON
    ),
    # Absolute positions; its loader writes transposed views of the weights.
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=128, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1
    ),
}


def new_learner(name: str) -> nn.Module:
    """A float32 model with the weights that the sampler of this name was built with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def logprobs_of(
    learner: nn.Module, ids: list[int], start: int = 1, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of ids[start:], each given all before it, by one forward pass."""
    logits = learner(torch.tensor([ids])).logits[0, start - 1 : -1].float()
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[start:])[:, None]).squeeze(-1)


def publish(resync: Resync, sampler: ColocatedSampler) -> int:
    """One publish, as the engine does it; returns the bytes copied."""
    num_bytes = resync.publish()
    sampler.weights_changed(sampler.weight_version + 1)
    resync.verify()
    return num_bytes


def connect(
    sampler: ColocatedSampler, learner: nn.Module, mode: str = "auto", **options: object
) -> Resync:
    """The sampler with the learner's weights, published once."""
    resync = Resync(sampler.load_weights, sampler.module, learner, mode, **options)
    publish(resync, sampler)
    return resync


def random_completion(rng: random.Random, length: int) -> Completion:
    """Tokens and logprobs out of the air."""
    ids = [rng.randrange(3, 60) for _ in range(length)]
    logprobs = [-rng.random() * 4 for _ in range(length)]
    return Completion.of(ids, logprobs, finished=True, weight_version=1)


def rollouts_of(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    *,
    group_size: int = 1,
    **columns: Sequence[torch.Tensor],
) -> StepRollouts:
    """A prompt and a completion in each row. Columns by row."""
    columns.setdefault("sampler_logprobs", [torch.from_numpy(c.logprobs) for c in completions])
    return StepRollouts(
        sequences=[
            TokenSequence.of(prompt, completion.token_ids)
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
        group_ids=np.arange(len(prompts)) // group_size,
        rewards=torch.zeros(len(prompts), dtype=torch.float64),
        **{name: torch.cat(list(parts)) for name, parts in columns.items()},
    )
