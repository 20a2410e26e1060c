"""Models with one number for each token: critic, reward model, process reward model.

All three are transformers' sequence classifiers with one label, so other libraries load their
checkpoints too. A token's number is read from the hidden state at that token.

    score = head(hidden state) + reward_bias

reward_bias is an attribute of the model's config, 0 where there is none: it makes the mean reward 0
(InstructGPT, https://arxiv.org/abs/2203.02155 section 3.5). The classifiers' heads have no bias, so
what transformers itself computes is the score without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from warpo.engine.errors import ConfigError
from warpo.engine.models.batch import Batch
from warpo.engine.models.files import load_weights, read_config
from warpo.engine.models.model import attention_of, hidden_at, inputs_of, prepare


def load_scalar_model(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """The classifier of a Hugging Face directory, without dropout, reading packed sequences.

    The directory of a language model serves too: its trunk is taken, with a head that starts at 0.

    Raises:
        ConfigError: the classifier has more labels than one.
    """
    config = read_config(path)
    is_classifier = any("Classification" in name for name in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise ConfigError(
            f"{path} is a classifier of {config.num_labels} labels, wanted one with a single label"
        )
    verbosity = transformers_logging.get_verbosity()
    # It warns of a head that is new, which here is meant.
    transformers_logging.set_verbosity_error()
    try:
        model = load_weights(
            AutoModelForSequenceClassification,
            path,
            num_labels=1,
            new=() if is_classifier else ("score.weight",),
            dtype=dtype,
            attn_implementation=attention_of(config, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not is_classifier:
        nn.init.zeros_(model.get_parameter("score.weight"))
    prepare(model)
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides the signature of nn.Module.to
    return model


def token_scores(model: PreTrainedModel, batch: Batch, index: Tensor) -> Tensor:
    """Scores (K,) float32 at K of the tokens of a packed micro-batch.

    Args:
        index: (K,) int64, places among the N tokens of the row; `batch.logit_positions` gives the
            value of the state before each trained token.
    """
    output = model.base_model(**inputs_of(model, batch))
    hidden = hidden_at(model, output.last_hidden_state, batch, index)
    scores: Tensor = model.get_submodule("score")(hidden)
    return scores.float().squeeze(-1) + getattr(model.config, "reward_bias", 0.0)
