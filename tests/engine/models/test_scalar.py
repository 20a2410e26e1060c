"""Models with one number a token: against plain transformers, sequence by sequence."""

import pytest
import torch
import transformers

from warpo.engine.errors import ConfigError
from warpo.engine.models.batch import pack
from warpo.engine.models.scalar import load_scalar_model, token_scores
from warpo.engine.types import TokenSequence

SEQUENCES = [([3, 4, 5, 6, 7], 2), ([3, 4, 9], 2), ([8, 9, 10, 11], 1)]
CPU = torch.device("cpu")


def save_classifier(folder, num_labels: int = 1):
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=num_labels,
        pad_token_id=0,
    )
    model = transformers.Qwen2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return model.eval()


def test_packed_scores_equal_those_of_the_sequences_alone(tmp_path):
    plain = save_classifier(tmp_path)
    model = load_scalar_model(str(tmp_path), "float32", CPU)
    batch = pack([TokenSequence.of(ids[:n], ids[n:]) for ids, n in SEQUENCES])
    found = token_scores(model, batch, batch.logit_positions)
    wanted = []
    for ids, prompt in SEQUENCES:
        hidden = plain.model(torch.tensor([ids])).last_hidden_state[0, prompt - 1 : -1]
        wanted.append(plain.score(hidden).squeeze(-1))
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_a_language_model_gets_a_head_that_starts_at_zero(model_path):
    model = load_scalar_model(model_path("qwen2"), "float32", CPU)
    assert (model.score.weight == 0).all()
    assert model.config.num_labels == 1


def test_a_checkpoint_keeps_its_head(tmp_path, model_path):
    model = load_scalar_model(model_path("qwen2"), "float32", CPU)
    torch.nn.init.ones_(model.score.weight)
    model.save_pretrained(tmp_path)
    assert (load_scalar_model(str(tmp_path), "float32", CPU).score.weight == 1).all()


def test_a_classifier_of_two_labels_is_refused(tmp_path):
    save_classifier(tmp_path, num_labels=2)
    with pytest.raises(ConfigError, match="2 labels"):
        load_scalar_model(str(tmp_path), "float32", CPU)


def test_the_bias_of_the_config_is_part_of_the_score(tmp_path, model_path):
    model = load_scalar_model(model_path("qwen2"), "float32", CPU)
    model.config.reward_bias = -0.75
    model.save_pretrained(tmp_path)
    batch = pack([TokenSequence.of(ids[:n], ids[n:]) for ids, n in SEQUENCES])
    loaded = load_scalar_model(str(tmp_path), "float32", CPU)
    assert (token_scores(loaded, batch, batch.logit_positions) == -0.75).all()
