"""Learner and sampler score the same tokens: what passes for rounding, and what is said of the
rest."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from tests.engine.random_models import connect
from warpo.engine.config.sections import ROUNDING
from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.models.model import load_model
from warpo.engine.rollout.sampler.base import Sampler
from warpo.engine.weights.probe import probe_weights

RNG = random.Random(0)
SEQUENCES = [[RNG.randrange(2, 60) for _ in range(RNG.randint(5, 24))] for _ in range(4)]
FLOAT32 = ROUNDING["float32"]


@pytest.fixture
def learner(model_path):
    return load_model(model_path("qwen2"), "float32", torch.device("cpu"))


def test_equal_weights_pass_and_unequal_ones_do_not(build, kind, learner):
    sampler = build(kind, "qwen2")
    probe = probe_weights(learner, sampler, SEQUENCES, FLOAT32)
    torch.testing.assert_close(probe.learner, probe.sampler, atol=1e-4, rtol=0)
    with torch.no_grad():
        learner.get_input_embeddings().weight[7:].mul_(1.2)
    with pytest.raises(WeightMismatch, match="the sampler does not compute what the learner does"):
        probe_weights(learner, sampler, SEQUENCES, FLOAT32)
    connect(sampler, learner)
    probe = probe_weights(learner, sampler, SEQUENCES, FLOAT32)
    torch.testing.assert_close(probe.learner, probe.sampler, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_tensor_that_is_off_by_a_hundredth_is_seen_in_float32(build, kind, learner, name):
    """The worst token alone would not tell: the mean does."""
    sampler = build(kind, "qwen2")
    with torch.no_grad():
        learner.get_parameter(name).mul_(1.01)
    with pytest.raises(WeightMismatch, match=r"their mean is 0\.\d+, where 0\.001 is allowed"):
        probe_weights(learner, sampler, SEQUENCES, FLOAT32)


def test_the_error_names_token_place_share_values_and_cure(build, learner):
    sampler = build("transformers", "qwen2-untied")
    learner = connect_a_learner_with_one_other_row(build, sampler)
    with pytest.raises(WeightMismatch) as caught:
        probe_weights(learner, sampler, [[3, 4, 5], [6, 7, 41, 8]], FLOAT32, lambda ids: f"<{ids}>")
    for part in (
        r"of 5 tokens (",
        "than probe.tolerance = 0.01",
        "token 41 '<[41]>' at position 2 of probed sequence 1: logprob ",
        "set probe.tolerance above ",
    ):
        assert part in str(caught.value), caught.value


def connect_a_learner_with_one_other_row(
    build: Callable[[str, str], Sampler], sampler: Sampler
) -> torch.nn.Module:
    learner = load_model(sampler.module.config.name_or_path, "float32", torch.device("cpu"))
    with torch.no_grad():
        learner.get_output_embeddings().weight[41] -= 1.0
    return learner


def test_logprobs_of_tens_of_thousands_are_compared_by_what_they_are(build, learner):
    """After a learning rate of 10 even rounding is past any absolute tolerance."""
    sampler = build("vllm", "qwen2")
    with torch.no_grad():
        learner.get_parameter("model.norm.weight").mul_(1e5)
    connect(sampler, learner)
    probe = probe_weights(learner, sampler, SEQUENCES, FLOAT32)
    assert probe.learner.min() < -10_000
    assert (probe.learner - probe.sampler).abs().max() > FLOAT32


def test_weights_that_are_not_finite_are_not_blamed_on_the_sampler(build, learner):
    sampler = build("transformers", "qwen2")
    with torch.no_grad():
        learner.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = torch.nan
    message = r"the model's weights are not finite: model\.layers\.1\.mlp\.down_proj\.weight holds"
    with pytest.raises(TrainingError, match=message):
        probe_weights(learner, sampler, SEQUENCES, FLOAT32)
    with torch.no_grad():
        learner.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = 0.0
        learner.get_parameter("model.norm.weight").fill_(3e38)
    with pytest.raises(TrainingError, match="logprobs are not finite, though its weights are"):
        probe_weights(learner, sampler, SEQUENCES, FLOAT32)
