"""Publishing: after it the sampler computes with the learner's weights, all of them, or refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.engine.models import CONFIGS, LOGPROB_ATOL, logprobs_of, new_learner
from warpo.engine.errors import SamplerError
from warpo.engine.resync import CopyPlan
from warpo.engine.sampler.base import Sampler, SamplingOptions

# Three blocks of 32 tokens and a rest: a prefix cache holds the blocks.
LONG_PROMPT = [2 + (7 * i) % 60 for i in range(100)]
OPTIONS = SamplingOptions(group_size=4, temperature=1.0, max_new_tokens=6, seed=3)


def perturb(learner: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return learner


def generation_error(sampler: Sampler, learner: nn.Module) -> float:
    """Largest difference between the sampler's logprobs of its completions and the learner's."""
    (group,) = sampler.generate([LONG_PROMPT], OPTIONS)
    return max(
        (torch.tensor(c.logprobs) - logprobs_of(learner, LONG_PROMPT + c.token_ids, 100))
        .abs()
        .max()
        .item()
        for c in group
    )


def score_error(sampler: Sampler, learner: nn.Module) -> float:
    (scores,) = sampler.score([LONG_PROMPT])
    return (torch.tensor(scores) - logprobs_of(learner, LONG_PROMPT)).abs().max().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sampler_computes_with_the_published_weights(
    build: Callable[[str, str], Sampler], kind: str, name: str
) -> None:
    sampler, learner = build(kind, name), new_learner(name)
    assert generation_error(sampler, learner) < LOGPROB_ATOL
    perturb(learner)
    assert score_error(sampler, learner) > 0.1
    version = sampler.weight_version

    num_bytes = sampler.publish(learner)

    assert num_bytes == 4 * sum(parameter.numel() for parameter in learner.parameters())
    assert sampler.weight_version == version + 1
    assert sampler.generate([[7]], OPTIONS)[0][0].weight_version == version + 1
    assert score_error(sampler, learner) < LOGPROB_ATOL
    assert generation_error(sampler, learner) < LOGPROB_ATOL


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_reaches_the_sampler(
    build: Callable[[str, str], Sampler], kind: str, name: str
) -> None:
    """One parameter at a time, so that none can hide behind another's effect."""
    sampler, learner = build(kind, name), new_learner(name)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in learner.named_parameters():
        original = parameter.detach().clone()
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        assert score_error(sampler, learner) > 10 * LOGPROB_ATOL, parameter_name
        sampler.publish(learner)
        assert score_error(sampler, learner) < LOGPROB_ATOL, parameter_name
        parameter.data.copy_(original)
        sampler.publish(learner)


def test_cached_prefixes_are_forgotten(
    build: Callable[[str, str], Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, learner = build("vllm", "qwen2"), new_learner("qwen2")
    assert generation_error(sampler, learner) < LOGPROB_ATOL
    monkeypatch.setattr(sampler._llm, "reset_prefix_cache", lambda: True)
    sampler.publish(perturb(learner))
    # With the reset left out the old weights' keys and values are still attended to.
    assert generation_error(sampler, learner) > 0.1
    monkeypatch.undo()
    sampler.publish(learner)
    assert generation_error(sampler, learner) < LOGPROB_ATOL


def test_a_prefix_cache_that_stays_is_an_error(
    build: Callable[[str, str], Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = build("vllm", "qwen2")
    version = sampler.weight_version
    monkeypatch.setattr(sampler._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="kept its prefix cache"):
        sampler.publish(new_learner("qwen2"))
    assert sampler.weight_version == version


def test_publishing_follows_an_optimizer(build: Callable[[str, str], Sampler], kind: str) -> None:
    sampler, learner = build(kind, "qwen2"), new_learner("qwen2").train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    ids = torch.tensor([LONG_PROMPT])
    for _ in range(3):
        optimizer.zero_grad()
        learner(ids, labels=ids).loss.backward()
        optimizer.step()
        assert score_error(sampler, learner) > 0.1
        sampler.publish(learner)
        assert score_error(sampler, learner) < LOGPROB_ATOL


def test_parameters_that_moved_are_found_again(
    build: Callable[[str, str], Sampler], kind: str
) -> None:
    sampler, learner = build(kind, "qwen2"), new_learner("qwen2")
    sampler.publish(learner)
    for parameter in perturb(learner).parameters():
        parameter.data = parameter.data.clone()
    sampler.publish(perturb(learner))
    assert score_error(sampler, learner) < LOGPROB_ATOL


def test_the_copy_rounds_to_the_samplers_dtype() -> None:
    learner, sampler = new_learner("llama"), new_learner("llama").bfloat16()
    plan = CopyPlan(lambda weights: load_by_name(sampler, weights), sampler, perturb(learner))
    assert plan.replay() == 2 * sum(parameter.numel() for parameter in learner.parameters())
    for copied, parameter in zip(sampler.parameters(), learner.parameters(), strict=True):
        assert torch.equal(copied, parameter.bfloat16())


def load_by_name(sampler: nn.Module, weights: object) -> None:
    own = dict(sampler.named_parameters())
    for name, weight in weights:
        own[name].data.copy_(weight)


def with_extra_parameter() -> nn.Module:
    learner = new_learner("qwen2")
    learner.model.extra = nn.Parameter(torch.zeros(3))
    return learner


def with_fewer_layers() -> nn.Module:
    learner = new_learner("qwen2")
    del learner.model.layers[1]
    return learner


def with_a_wider_mlp() -> nn.Module:
    learner = new_learner("qwen2")
    for projection in (learner.model.layers[1].mlp.gate_proj, learner.model.layers[1].mlp.up_proj):
        projection.weight = nn.Parameter(torch.zeros(100, 128))
    learner.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(128, 100))
    return learner


def with_another_vocabulary() -> nn.Module:
    learner = new_learner("qwen2")
    learner.resize_token_embeddings(80, mean_resizing=False)
    return learner


def untied() -> nn.Module:
    learner = new_learner("qwen2")
    learner.lm_head.weight = nn.Parameter(learner.lm_head.weight.detach().clone())
    return learner


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (with_extra_parameter, "extra"),
        (with_fewer_layers, r"layers\.1\."),
        (with_a_wider_mlp, r"layers\.1\.mlp"),
        (with_another_vocabulary, "embed_tokens"),
        (untied, "lm_head.weight"),
    ],
)
def test_another_model_is_refused_by_name(
    build: Callable[[str, str], Sampler],
    kind: str,
    learner: Callable[[], nn.Module],
    message: str,
) -> None:
    sampler = build(kind, "qwen2")
    version = sampler.weight_version
    with pytest.raises(SamplerError, match=message):
        sampler.publish(learner())
    assert sampler.weight_version == version
    assert score_error(sampler, new_learner("qwen2")) < LOGPROB_ATOL


def test_a_tied_learner_is_refused_by_an_untied_sampler(
    build: Callable[[str, str], Sampler], kind: str
) -> None:
    learner = new_learner("qwen2-untied")
    learner.lm_head.weight = learner.model.embed_tokens.weight
    with pytest.raises(SamplerError, match="lm_head.weight"):
        build(kind, "qwen2-untied").publish(learner)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda own, w: own.copy_(w[:2]), r"weight is copied as \(2, 4\) into \(3, 4\)"),
        (lambda own, w: own.copy_(2 * w), "transforms the learner's weight"),
        (lambda own, w: None, r"weight \(0 of 12 elements\)"),
        (lambda own, w: (own.copy_(w), own.copy_(w)), r"weight \(24 of 12 elements\)"),
        (lambda own, w: own[:2].copy_(w[:2]), r"weight \(8 of 12 elements\)"),
    ],
)
def test_a_loader_that_does_not_copy_is_refused(
    load: Callable[[torch.Tensor, torch.Tensor], object], message: str
) -> None:
    learner, sampler = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def load_weights(weights: object) -> None:
        for _, weight in weights:
            load(sampler.weight.data, weight)

    with pytest.raises(SamplerError, match=message):
        CopyPlan(load_weights, sampler, learner)


def test_a_fused_parameter_missing_a_part_is_refused() -> None:
    learner = nn.ModuleDict({"query": nn.Linear(4, 4, bias=False)})
    sampler = nn.ModuleDict({"qkv": nn.Linear(4, 12, bias=False)})

    def load_weights(weights: object) -> None:
        for _, weight in weights:
            sampler.qkv.weight.data[:4].copy_(weight)

    with pytest.raises(SamplerError, match=r"qkv.weight \(12, 4\) would get 16 of its 48 elements"):
        CopyPlan(load_weights, sampler, learner)
