"""The learner: a Hugging Face causal model that reads packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from warpo.engine.attention import ATTENTION
from warpo.engine.batch import Batch
from warpo.engine.errors import ConfigError
from warpo.engine.linear import Linear, linear
from warpo.engine.model_files import load_tokenizer as load_tokenizer
from warpo.engine.model_files import load_weights
from warpo.kernels import ops


class Float32Head(nn.Linear):
    """logits = float32(hidden) float32(weight)^T, whatever the dtype of the weight, which stays."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden.float(), self.weight.float(), bias)


def set_lm_head_dtype(model: PreTrainedModel, lm_head_dtype: str) -> None:
    """Let the model compute its logits in float32, where lm_head_dtype is not "same".

    The float32 copy of the weight lives for a forward pass and its backward.

    Raises:
        ConfigError: the head is no linear layer.
    """
    if lm_head_dtype == "same":
        return
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Linear):
        raise ConfigError(
            f"lm_head_dtype = {lm_head_dtype!r} needs a model whose head is a linear layer, this "
            f"one's is {type(head).__name__}: set it to same"
        )
    head.__class__ = Float32Head


def load_model(
    path: str, dtype: str, device: torch.device, lm_head_dtype: str = "same"
) -> PreTrainedModel:
    """The model of a Hugging Face directory, without dropout, reading packed sequences."""
    model = load_weights(AutoModelForCausalLM, path, dtype=dtype, attn_implementation=ATTENTION)
    prepare(model)
    set_lm_head_dtype(model, lm_head_dtype)
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides the signature of nn.Module.to
    return model


def prepare(model: PreTrainedModel) -> None:
    """Take the dropout out of a loaded model, and let oneDNN compute its products on a CPU."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module) is nn.Linear:
            module.__class__ = Linear
    model.config.attention_dropout = 0.0


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion, of the model's generation config and of its tokenizer.

    Raises:
        ConfigError: one is not an id of the model's vocabulary, and could never end anything.
    """
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    ids.discard(None)
    vocab_size = model.config.get_text_config().vocab_size
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ConfigError(
                f"{model.config.name_or_path}: eos_token_id is {token!r}, and the model's "
                f"vocabulary is 0 to {vocab_size - 1}: correct generation_config.json, config.json "
                "or the tokenizer's files"
            )
    return sorted(ids)


def token_logprobs(model: nn.Module, batch: Batch, temperature: float) -> ops.LogprobsAndEntropy:
    """logprobs and entropy, each (M,), of the completion tokens of a packed micro-batch.

    Logits are computed for the M tokens that predict completion tokens only.
    """
    logits = _forward(model, batch).logits[0]
    return ops.logprobs_and_entropy(logits, batch.targets, temperature=temperature)


def token_logprobs_and_values(
    model: nn.Module, value_head: nn.Module, batch: Batch, temperature: float
) -> tuple[ops.LogprobsAndEntropy, Tensor]:
    """The same, and the values (M,) float32 that a head on the last hidden states gives to the
    states before those tokens.
    """
    output = _forward(model, batch, output_hidden_states=True)
    hidden = output.hidden_states[-1][0, batch.predictors]
    logprobs = ops.logprobs_and_entropy(output.logits[0], batch.targets, temperature=temperature)
    return logprobs, value_head(hidden.float()).squeeze(-1)


def _forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    return model(**packed_inputs(batch), logits_to_keep=batch.predictors, **options)


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """What a model with packed attention reads of a micro-batch."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        # Without one, transformers looks for the sequences of a row by itself, by their positions.
        "attention_mask": torch.ones_like(batch.input_ids),
        "slots": batch.slots,
        "places": batch.places,
        "use_cache": False,
    }
