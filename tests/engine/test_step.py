"""The learner's side of a step, without a sampler."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.models import new_learner, random_completion
from warpo.engine.batch import Rollout, pack, split_by_tokens
from warpo.engine.errors import TrainingError
from warpo.engine.model import load_model, token_logprobs
from warpo.engine.optimizer import AdamW
from warpo.engine.step import (
    accumulate_gradients,
    apply_gradients,
    denominator,
    make_minibatches,
    with_scores,
)
from warpo.kernels.objectives import OBJECTIVES

MODELS = ["qwen2", "qwen2-untied", "qwen3", "llama", "gpt2"]


def rollouts(number: int = 12, seed: int = 0) -> list[Rollout]:
    rng = random.Random(seed)
    made = []
    for _ in range(number):
        length = rng.randint(1, 9)
        completion = random_completion(rng, length)
        prompt = [rng.randrange(3, 60) for _ in range(rng.randint(1, 7))]
        made.append(
            Rollout(
                prompt_ids=prompt,
                completion=completion,
                advantages=torch.full((length,), rng.uniform(-1, 1)),
            )
        )
    return made


@pytest.fixture
def learner(model_path):
    return load_model(model_path("qwen2"), "float32", torch.device("cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_packed_logprobs_are_those_of_each_sequence_alone(model_path, name):
    made = rollouts()
    model = load_model(model_path(name), "float32", torch.device("cpu"))
    packed = token_logprobs(model, pack(made), 0.7).logprobs
    plain = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32)
    alone = []
    for rollout in made:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion.token_ids])
        logp = torch.log_softmax(plain(ids).logits[0] / 0.7, -1)
        start = len(rollout.prompt_ids) - 1
        targets = torch.tensor(rollout.completion.token_ids)
        alone.append(logp[start:-1].gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_rollouts_share_is_read_once_and_changes_nothing(model_path, name):
    made = rollouts()
    # groups of three, dealt out of order; one prompt is the beginning of another
    prompts = [[7, 9, 11], [7, 9], [40, 3, 3, 50], [5]]
    made = [replace(r, prompt_ids=prompts[i % 4]) for i, r in enumerate(made)]
    model = load_model(model_path(name), "float32", torch.device("cpu"))
    batch = pack(made)
    num_completion_tokens = sum(len(r.completion.token_ids) for r in made)
    assert batch.input_ids.shape == (1, sum(map(len, prompts)) + num_completion_tokens)
    together = token_logprobs(model, batch, 0.7).logprobs
    apart = torch.cat([token_logprobs(model, pack([r]), 0.7).logprobs for r in made])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(together))
    gradients = []
    for logprobs in (together, apart):
        model.zero_grad()
        (weights * logprobs).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 1e-6, error


def gradient(model, batches, objective):
    model.zero_grad()
    metrics, _ = accumulate_gradients(model, batches, objective, temperature=1.0, max_new_tokens=16)
    return [p.grad.clone() for p in model.parameters()], metrics


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_loss_and_gradient_do_not_depend_on_micro_batches(learner, name):
    objective = OBJECTIVES[name]
    reference = learner if objective.kl_coef else None
    made = rollouts()
    results = []
    for budget in (16, 40, 1000):
        (batches,) = make_minibatches(made, 1, budget, seed=3)
        batches = [
            with_scores(batch, learner, reference, temperature=1.0, recompute_old=False)
            for batch in batches
        ]
        results.append((len(batches), *gradient(learner, batches, objective)))
    assert [number for number, *_ in results] == sorted(
        {number for number, *_ in results}, reverse=True
    ), "the budgets made the same split"
    _, whole, metrics = results[-1]
    largest = max(g.abs().max() for g in whole)
    assert largest > 0
    for _, split, split_metrics in results[:-1]:
        for a, b in zip(split, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * largest.item())
        torch.testing.assert_close(split_metrics, metrics, rtol=1e-4, atol=1e-5)


def test_denominators_are_counted_over_the_optimizer_step():
    made = rollouts(5)
    batches = [pack(made[:2]), pack(made[2:])]
    tokens = sum(len(r.completion.token_ids) for r in made)
    assert denominator(batches, OBJECTIVES["dapo"], 10) == tokens
    assert denominator(batches, OBJECTIVES["grpo"], 10) == 5
    assert denominator(batches, OBJECTIVES["dr_grpo"], 10) == 50


def test_minibatches_deal_every_rollout_once():
    made = rollouts(13)
    minibatches = make_minibatches(made, 4, 64, seed=1)
    assert [sum(b.num_sequences for b in part) for part in minibatches] == [4, 3, 3, 3]
    dealt = sorted(a for part in minibatches for b in part for a in b.advantages.tolist())
    assert dealt == sorted(a for r in made for a in r.advantages.tolist())
    assert all(b.input_ids.numel() <= 64 for part in minibatches for b in part)


def test_a_rollout_larger_than_the_budget_is_refused_with_the_setting():
    with pytest.raises(ValueError, match="raise update.token_budget or lower rollout.max_new"):
        split_by_tokens(rollouts(3), 2)


def test_a_gradient_that_is_not_finite_stops_before_the_step(learner):
    batch = pack(rollouts(4))
    batch.advantages[1] = torch.nan
    before = [p.clone() for p in learner.parameters()]
    optimizer = AdamW(learner.named_parameters(), lr=1.0)
    accumulate_gradients(learner, [batch], OBJECTIVES["dapo"], temperature=1.0, max_new_tokens=16)
    with pytest.raises(TrainingError, match="gradient norm is nan: the step was not taken"):
        apply_gradients(optimizer, 1.0)
    for a, b in zip(before, learner.parameters(), strict=True):
        assert torch.equal(a, b) and b.grad is None


def test_new_learner_is_the_model_on_disk(model_path, learner):
    for a, b in zip(new_learner("qwen2").parameters(), learner.parameters(), strict=True):
        assert torch.equal(a, b)
