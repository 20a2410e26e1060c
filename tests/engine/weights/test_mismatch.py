"""Differences between sampler and learner, cause by cause, and what is done about them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.engine.random_models import (
    EOS_TOKEN_IDS,
    MAX_MODEL_LEN,
    connect,
    new_learner,
    rollouts_of,
)
from tests.tolerance import CORRECTION_GRADIENT, LEARNER_COMPOSITION
from warpo.engine.config.sections import ROUNDING
from warpo.engine.errors import ConfigError, WeightMismatch
from warpo.engine.learner.agreement import Probed
from warpo.engine.learner.drift import Drift
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.model import load_model, set_lm_head_dtype, token_logprobs
from warpo.engine.models.score import pack_scored, score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.rollout.sampler.base import Sampler
from warpo.engine.rollout.sampler.hf_sampler import TransformersSampler
from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler
from warpo.engine.types import Completion
from warpo.engine.weights import mismatch
from warpo.engine.weights.probe import probe_weights
from warpo.kernels import ops
from warpo.kernels.objectives import OBJECTIVES

CPU = torch.device("cpu")
MODELS = ["qwen2", "qwen2-untied", "qwen3", "llama", "gpt2"]


def token_ids(number: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 60) for _ in range(rng.randint(low, high))] for _ in range(number)]


def rollouts(number: int, seed: int = 0) -> StepRollouts:
    texts = token_ids(number, 5, 24, seed)
    made = rollouts_of(
        [ids[:3] for ids in texts],
        [
            Completion.of(ids[3:], [-3.0] * len(ids[3:]), finished=True, weight_version=1)
            for ids in texts
        ],
        advantages=[
            torch.full((len(ids) - 3,), (-1.0) ** i * (1 + i % 3)) for i, ids in enumerate(texts)
        ],
    )
    return replace(made, probed=range(number))


@pytest.fixture
def learner(model_path: Callable[[str], str]) -> nn.Module:
    return load_model(model_path("qwen2"), "float32", CPU)


def test_kernels_are_the_differences_of_the_probe() -> None:
    sampler = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    difference = torch.tensor([0.0, 0.09, 0.10, -0.11])
    found = mismatch.kernels(Probed(learner=sampler + difference, sampler=sampler))
    assert found == {
        "mismatch/kernels_mean": pytest.approx(0.075, abs=1e-6),
        "mismatch/kernels_max": pytest.approx(0.11, abs=1e-6),
        # e^0.09 = 1.094 is inside, e^0.10 = 1.105 and e^-0.11 = 0.896 are not
        "mismatch/kernels_outside": 0.5,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [70, 5000, 151936])
def test_our_kernels_do_not_see_the_grouping_of_rows(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = 300 if vocab < 100_000 else 24
    logits = (4 * torch.randn(rows, vocab)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,))

    def results(size: int) -> tuple[Tensor, ...]:
        parts = [
            ops.logprobs_and_entropy(logits[i : i + size], targets[i : i + size], temperature=0.7)
            for i in range(0, rows, size)
        ]
        logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        (gradient,) = torch.autograd.grad((logprobs + 0.1 * entropy).sum(), logits)
        return logprobs, entropy, gradient

    together = results(rows)
    for size in (1, 7, 16):
        for a, b in zip(together, results(size), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_the_learner_depends_on_packing_by_no_more_than_attention_and_matrix_products_add(
    model_path: Callable[[str], str], name: str
) -> None:
    learner = load_model(model_path(name), "float32", CPU)
    sequences = token_ids(16, 5, 150)
    packed = score(learner, pack_scored(learner, sequences), 1.0)
    found = mismatch.composition(learner, sequences, Probed(packed, packed))
    worst = found["mismatch/composition_max"]
    print(f"{name}: packed against alone differ by up to {worst:.2e} nats")
    assert worst <= LEARNER_COMPOSITION
    for size in (2, 5):
        parts = [
            score(learner, pack_scored(learner, sequences[i : i + size]), 1.0)
            for i in range(0, len(sequences), size)
        ]
        assert (torch.cat(parts) - packed).abs().max() <= LEARNER_COMPOSITION


def test_composition_names_the_largest_difference(learner: nn.Module) -> None:
    sequences = token_ids(3, 5, 9)
    packed = score(learner, pack_scored(learner, sequences), 1.0)
    planted = packed.clone()
    planted[3] += 0.25
    found = mismatch.composition(learner, sequences, Probed(planted, packed))
    assert found["mismatch/composition_max"] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_drift_is_from_the_first_update_to_the_last(learner: nn.Module, updates: int) -> None:
    batch = rollouts(3).batch(range(3))
    before = score(learner, batch, 0.7)
    drift = Drift(learner, rollouts(3), 0.7)
    for update in range(updates):
        if 0 < update == updates - 1:
            drift.before_last_update()
            expected = (score(learner, batch, 0.7) - before).abs()
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(1.02)
    found = drift.metrics(truncated=True)
    if updates == 1:
        expected = torch.zeros(1)
    assert found["mismatch/staleness_mean"] == pytest.approx(expected.mean().item())
    assert found["mismatch/staleness_max"] == pytest.approx(expected.max().item())
    assert (found["mismatch/staleness_mean"] > 1e-3) == (updates > 1)
    assert found["mismatch/truncation_mean"] == pytest.approx((-3.0 - before).mean().item())
    assert found["mismatch/sampling_max"] == pytest.approx((-3.0 - before).abs().max().item())
    assert drift.metrics(truncated=False)["mismatch/truncation_mean"] == 0


def test_without_a_probe_nothing_is_measured(learner: nn.Module) -> None:
    drift = Drift(learner, replace(rollouts(3), probed=()), 1.0)
    drift.before_last_update()
    assert drift.metrics(truncated=True) == {}
    assert drift.sampling_difference == float("inf")


def corrected(log_weights: Tensor, starts: list[int], correction: str) -> Tensor:
    """The weight of each token by the papers' formulas, in float64, range [0.6, 1.5]."""
    kind, level = correction.split("_")
    if level == "sequence":
        sums = [log_weights[a:b].sum().expand(b - a) for a, b in pairwise(starts)]
        log_weights = torch.cat(sums)
    weight = log_weights.exp()
    cut = weight.clamp(0.6, 1.5)
    return cut if kind == "truncate" else torch.where(cut == weight, weight, 0.0)


@pytest.mark.parametrize(
    "correction", ["truncate_token", "truncate_sequence", "mask_token", "mask_sequence"]
)
def test_a_correction_weighs_the_gradient_by_its_formula(
    learner: nn.Module, correction: str
) -> None:
    kind, level = correction.split("_")
    objective = OBJECTIVES["dapo"].replace(
        correction=kind, correction_level=level, correction_low=0.6, correction_high=1.5
    )
    torch.manual_seed(0)
    batch = rollouts(8).batch(range(8))
    batch.old_logprobs = score(learner, batch, 1.0) + 0.1 * torch.randn(batch.targets.numel())
    batch.sampler_logprobs = batch.old_logprobs - 0.3 * torch.randn(batch.targets.numel())

    starts = batch.cu_seqlens.tolist()
    difference = (batch.old_logprobs - batch.sampler_logprobs).double()
    weight = corrected(difference, starts, correction)
    inside = (weight > 0.6) & (weight < 1.5)
    assert 0 < inside.sum() < len(weight), "the planted differences do not reach the range's ends"
    advantages = batch.advantages.double()
    logp = token_logprobs(learner, batch, 1.0).logprobs.double()
    ratio = (logp - batch.old_logprobs).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    expected = torch.autograd.grad(-(weight * surrogate).mean(), list(learner.parameters()))

    accumulate_gradients(learner, [batch], objective, temperature=1.0, max_new_tokens=32)
    found = [parameter.grad for parameter in learner.parameters()]
    largest = max(gradient.abs().max() for gradient in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CORRECTION_GRADIENT * largest)


# of the session: a vLLM that is let go takes the process group of all others with it
@pytest.fixture(scope="session")
def build_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Sampler]:
    """A sampler of a bfloat16 model by kind and dtype of the head; each is built once and kept."""
    folder = str(tmp_path_factory.mktemp("bfloat16"))
    new_learner("qwen2").bfloat16().save_pretrained(folder)
    built: dict[tuple[str, str], Sampler] = {}

    def build(kind: str, lm_head_dtype: str) -> Sampler:
        if (kind, lm_head_dtype) not in built:
            options = dict(
                dtype="bfloat16",
                lm_head_dtype=lm_head_dtype,
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=EOS_TOKEN_IDS,
            )
            if kind == "vllm":
                pytest.importorskip("vllm")
            built[kind, lm_head_dtype] = (
                VllmSampler(folder, kv_cache_gib=1 / 32, **options)
                if kind == "vllm"
                else TransformersSampler(folder, **options)
            )
        return built[kind, lm_head_dtype]

    build.folder = folder  # type: ignore[attr-defined]
    return build


def logits_dtypes(module: nn.Module) -> list[torch.dtype]:
    """The dtypes of what a module will return."""
    seen: list[torch.dtype] = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    return seen


def test_a_float32_head_computes_in_float32_on_both_sides_and_stores_no_float32(
    build_bfloat16: Callable[[str, str], Sampler], kind: str
) -> None:
    sequences = token_ids(16, 20, 150)
    means = {}
    for lm_head_dtype, logits_dtype in (("same", torch.bfloat16), ("float32", torch.float32)):
        sampler = build_bfloat16(kind, lm_head_dtype)
        folder = build_bfloat16.folder  # type: ignore[attr-defined]
        learner = load_model(folder, "bfloat16", CPU, lm_head_dtype)
        if kind == "vllm":
            seen = logits_dtypes(sampler.module.logits_processor)
        else:
            seen = logits_dtypes(sampler.module.get_output_embeddings())
        seen_by_learner = logits_dtypes(learner.get_output_embeddings())
        # The learner moves, so that publishing into the sampler's storage is part of the test.
        with torch.no_grad():
            learner.get_output_embeddings().weight[7:].mul_(1.5)
        connect(sampler, learner)
        means[lm_head_dtype] = mismatch.kernels(probe_weights(learner, sampler, sequences, 0.2))[
            "mismatch/kernels_mean"
        ]
        assert set(seen) == set(seen_by_learner) == {logits_dtype}
        for side in (sampler.module, learner):
            assert {p.dtype for p in side.parameters()} == {torch.bfloat16}
    print(f"{kind}: mean |learner - sampler|, head in bfloat16 and float32: {means}")
    # 1e-6: the transformers sampler and the learner are the same code
    assert means["float32"] <= means["same"] + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_sure_passes_and_a_tensor_off_by_a_hundredth_does_not(
    build: Callable[[str, str], Sampler],
    build_bfloat16: Callable[[str, str], Sampler],
    model_path: Callable[[str], str],
    kind: str,
    dtype: str,
) -> None:
    """In bfloat16 the probe cannot tell a hundredth from rounding: the fingerprints can."""
    sampler = build(kind, "qwen2") if dtype == "float32" else build_bfloat16(kind, "same")
    folder = model_path("qwen2") if dtype == "float32" else build_bfloat16.folder  # type: ignore[attr-defined]
    learner = load_model(folder, dtype, CPU)
    with torch.no_grad():
        learner.get_parameter("model.norm.weight").mul_(16.0)
    resync = connect(sampler, learner, "copy")
    sequences = token_ids(16, 20, 150)
    probe = probe_weights(learner, sampler, sequences, ROUNDING[dtype])
    assert probe.learner.min() < -50
    if (kind, dtype) == ("vllm", "bfloat16"):
        assert (probe.learner - probe.sampler).abs().max() > 1e-2, "not sure enough to be refused"
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        sampler.module.get_parameter(name).mul_(1.01)
    with pytest.raises(WeightMismatch, match=rf"published: {name} \(1 of"):
        resync.verify()


def test_a_head_that_is_no_linear_layer_is_refused(learner: nn.Module) -> None:
    learner.set_output_embeddings(nn.Sequential(learner.get_output_embeddings()))
    set_lm_head_dtype(learner, "same")
    with pytest.raises(ConfigError, match="this one's is Sequential: set it to same"):
        set_lm_head_dtype(learner, "float32")


def test_the_gradient_through_a_float32_head_is_that_of_its_formula(
    build_bfloat16: Callable[[str, str], Sampler],
) -> None:
    folder = build_bfloat16.folder  # type: ignore[attr-defined]
    head = load_model(folder, "bfloat16", CPU, "float32").get_output_embeddings()
    hidden = torch.randn(5, 128).bfloat16().requires_grad_()
    exact = hidden.detach().double() @ head.weight.detach().double().T
    logits = head(hidden)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
    upstream = torch.randn_like(logits)
    by_hidden, by_weight = torch.autograd.grad(logits, (hidden, head.weight), upstream)
    torch.testing.assert_close(
        by_hidden, (upstream.double() @ head.weight.double()).bfloat16(), rtol=2**-7, atol=1e-5
    )
    torch.testing.assert_close(
        by_weight, (upstream.double().T @ hidden.double()).bfloat16(), rtol=2**-7, atol=1e-5
    )
