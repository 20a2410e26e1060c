"""The learner: a Hugging Face causal model that reads packed sequences."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from warpo.engine.batch import Batch
from warpo.engine.chat import end_of_turn
from warpo.engine.errors import ConfigError, DataError
from warpo.engine.linear import Linear, linear
from warpo.kernels import ops

ATTENTION = "warpo_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: Tensor,
    places: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row; the interface of transformers'
    attentions.

    The row is cut into a padded batch of whole sequences for this product alone, so that its cost
    is B x T^2 and not N^2. Padding follows the tokens, where the causal mask hides it.

    Args:
        query: (1, heads, N, D).  key, value: (1, kv heads, N, D).
        slots, places: as in `Batch`.

    Returns:
        (1, N, heads, D), and None in place of attention weights.

    Raises:
        ValueError: the model's sliding window is shorter than a sequence.
    """
    if sliding_window is not None and sliding_window < slots.shape[1]:
        raise ValueError(
            f"the model attends to {sliding_window} tokens back, a sequence has {slots.shape[1]}: "
            "lower rollout.max_model_len, sliding windows are not supported"
        )

    def unpack(x: Tensor) -> Tensor:
        rows = _take(x[0].transpose(0, 1).flatten(1), slots.flatten())
        return rows.view(*slots.shape, x.shape[1], x.shape[3]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        unpack(query),
        unpack(key),
        unpack(value),
        is_causal=True,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    rows = _take(out.transpose(1, 2).flatten(2).flatten(0, 1), places)
    return rows.view(1, -1, query.shape[1], query.shape[3]), None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], with a gradient that is the same in every run.

    A shared prompt is taken several times, so its gradient is a sum: on a GPU the backward of
    index_select adds with atomics, in any order, and that of an index sorts first.
    """
    return rows[index] if rows.is_cuda else rows.index_select(0, index)


AttentionInterface.register(ATTENTION, packed_attention)


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
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
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


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model."""
    saved_as = get_tokenizer_config(path).get("tokenizer_class")
    if saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        # AutoTokenizer prefers the class of the model's type, which splits text by its own rules.
        return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion, of the model's generation config, of its tokenizer and of the
    chat template.
    """
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    # A template that renders no plain turn has refused the prompts, or they are text.
    with suppress(DataError):
        ids.update(end_of_turn(tokenizer)[-1:])
    return sorted(token for token in ids if token is not None)


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
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        slots=batch.slots,
        places=batch.places,
        logits_to_keep=batch.predictors,
        use_cache=False,
        **options,
    )
