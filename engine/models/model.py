"""The learner: a Hugging Face causal model that reads packed sequences."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from warpo.engine.data.chat import end_of_turn
from warpo.engine.errors import ConfigError, DataError
from warpo.engine.models.attention import ATTENTION
from warpo.engine.models.batch import Batch
from warpo.engine.models.files import load_weights, read_config
from warpo.engine.models.head import Float32Head, Predictions, predictions_of
from warpo.engine.models.linear import Linear
from warpo.kernels import ops

# As `layer_types` of a config has them; the masks of the last two are the model's.
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def set_lm_head_dtype(model: PreTrainedModel, lm_head_dtype: str) -> None:
    """Let the model compute its logits in float32, where lm_head_dtype is not "same".

    Their gradients are rounded to the dtype of the weight, for products with it, where the head is
    fused, see `head`; elsewhere a float32 copy of the weight lives for both passes.

    Raises:
        ConfigError: the head is not a linear layer.
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
    attention = attention_of(read_config(path), MODEL_FOR_CAUSAL_LM_MAPPING)
    model = load_weights(AutoModelForCausalLM, path, dtype=dtype, attn_implementation=attention)
    prepare(model)
    set_lm_head_dtype(model, lm_head_dtype)
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides the signature of nn.Module.to
    return model


def other_layers(config: PretrainedConfig, cls: type[PreTrainedModel]) -> list[str]:
    """Kinds of layers of a model that are not plain attention: state, convolution, sparse."""
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    if not layers and cls._is_stateful:
        return ["state"]
    return sorted({str(layer) for layer in layers} - ATTENTION_LAYERS)


def attention_of(config: PretrainedConfig, classes: Any) -> str:
    """Packed attention; the model's own where some of its layers are of another kind: what those
    know of a sequence would pass to the next one of the row, so each sequence gets a row.
    """
    return "eager" if other_layers(config, classes[type(config)]) else ATTENTION


def prepare(model: PreTrainedModel) -> None:
    """Take the dropout out of a loaded model, and let oneDNN compute its products on a CPU."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module) is nn.Linear:
            module.__class__ = Linear
    model.config.attention_dropout = 0.0


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion, of the model's generation config, of its tokenizer and of the
    chat template.

    Raises:
        ConfigError: one is not an id of the model's vocabulary, and could never end anything.
    """
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    # A template that renders no plain turn has refused the prompts, or they are text.
    with suppress(DataError):
        ids.update(end_of_turn(tokenizer)[-1:])
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


def predict(
    model: nn.Module, batch: Batch, value_head: nn.Module | None = None
) -> tuple[Predictions, Tensor | None]:
    """Predictions of the M completion tokens of a packed micro-batch, and the values (M,) float32
    that a head on the last hidden states gives to the states before those tokens.

    Logits are computed for the M tokens that predict completion tokens only, all at once where they
    take at most LOGITS_BYTES.
    """
    options = {} if value_head is None else {"output_hidden_states": True}
    found, output = predictions_of(
        model, lambda: forward(model, batch, **options), batch.num_trained
    )
    if value_head is None:
        return found, None
    hidden = hidden_at(model, output.hidden_states[-1], batch, batch.logit_positions)
    return found, value_head(hidden.float()).squeeze(-1)


def token_logprobs(model: nn.Module, batch: Batch, temperature: float) -> ops.LogprobsAndEntropy:
    """logprobs and entropy, each (M,) float32, of those tokens."""
    return predict(model, batch)[0].logprobs(batch.targets, temperature)


def token_values(model: nn.Module, value_head: nn.Module, batch: Batch, index: Tensor) -> Tensor:
    """Values (K,) float32 of the states after the tokens of `index`; no token is predicted."""
    trunk: Any = model.base_model
    hidden = trunk(**inputs_of(model, batch)).last_hidden_state
    return value_head(hidden_at(model, hidden, batch, index).float()).squeeze(-1)  # type: ignore[no-any-return]


def forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's output, with logits (1, M, V) of the tokens that predict completion tokens."""
    if is_packed(model):
        return model(**inputs_of(model, batch), logits_to_keep=batch.logit_positions, **options)
    index = batch.scatter_index[batch.logit_positions]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[index][None],))
    try:
        return model(**inputs_of(model, batch), **options)
    finally:
        handle.remove()


def is_packed(model: nn.Module) -> bool:
    """True if a micro-batch is one row of the model, False if each sequence is a row."""
    return bool(model.config._attn_implementation == ATTENTION)  # type: ignore[union-attr]


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the model's inputs for a micro-batch.

    Rows of their own are padded on the right, where no token of a causal model sees it.
    """
    if not is_packed(model):
        return {"input_ids": batch.input_ids[0][batch.gather_index], "use_cache": False}
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        # Without one, transformers looks for the sequences of a row by itself, by their positions.
        "attention_mask": torch.ones_like(batch.input_ids),
        "gather_index": batch.gather_index,
        "scatter_index": batch.scatter_index,
        "subtree_end": batch.subtree_end,
        "segments": batch.segments,
        "use_cache": False,
    }


def hidden_at(model: nn.Module, hidden: Tensor, batch: Batch, index: Tensor) -> Tensor:
    """(K, H): hidden states of the model at K of the N tokens of a micro-batch."""
    return (
        hidden[0, index] if is_packed(model) else hidden.flatten(0, 1)[batch.scatter_index[index]]
    )
