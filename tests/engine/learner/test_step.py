"""The learner's side of a step, without a sampler."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.random_models import new_learner, random_completion, rollouts_of
from warpo.engine.errors import TrainingError
from warpo.engine.learner.losses import supervised_gradients
from warpo.engine.learner.minibatches import make_minibatches
from warpo.engine.learner.optimizer import AdamW
from warpo.engine.learner.step import accumulate_gradients, denominator
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.micro_batches import split_by_tokens
from warpo.engine.models.model import load_model, token_logprobs
from warpo.engine.models.score import score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import TokenSequence
from warpo.kernels.objectives import OBJECTIVES

MODELS = ["qwen2", "qwen2-untied", "qwen3", "llama", "gpt2"]


def rollouts(number: int = 12, seed: int = 0) -> StepRollouts:
    rng = random.Random(seed)
    prompts, completions, advantages = [], [], []
    for _ in range(number):
        length = rng.randint(1, 9)
        completions.append(random_completion(rng, length))
        prompts.append([rng.randrange(3, 60) for _ in range(rng.randint(1, 7))])
        advantages.append(torch.full((length,), rng.uniform(-1, 1)))
    return rollouts_of(prompts, completions, advantages=advantages)


@pytest.fixture
def learner(model_path):
    return load_model(model_path("qwen2"), "float32", torch.device("cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_packed_logprobs_are_those_of_each_sequence_alone(model_path, name):
    made = rollouts().sequences
    model = load_model(model_path(name), "float32", torch.device("cpu"))
    packed = token_logprobs(model, pack(made), 0.7).logprobs
    plain = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32)
    alone = []
    for sequence in made:
        ids = torch.from_numpy(sequence.token_ids)
        logp = torch.log_softmax(plain(ids[None]).logits[0] / 0.7, -1)
        start = sequence.prompt_length
        alone.append(logp[start - 1 : -1].gather(1, ids[start:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_spans_of_a_conversation_are_trained_and_what_is_between_is_read(model_path, name):
    """Turns of the model among turns of others: the logprobs are those of the whole text."""
    model = load_model(model_path(name), "float32", torch.device("cpu"))
    rng = random.Random(1)
    sequences = [
        TokenSequence(
            token_ids=np.array([7, 9, *(rng.randrange(3, 60) for _ in range(length - 2))]),
            trained_spans=spans,
        )
        for length, spans in ((12, ((2, 5), (8, 12))), (6, ((2, 3),)), (9, ((2, 4), (6, 7))))
    ]
    batch = pack(sequences)
    assert batch.cu_seqlens.tolist() == [0, 7, 8, 11] and batch.input_ids.numel() == 2 + 23 - 2
    found = token_logprobs(model, batch, 1.0).logprobs.split([7, 1, 3])
    for sequence, logprobs in zip(sequences, found, strict=True):
        whole = token_logprobs(model, pack([TokenSequence.scored(sequence.token_ids)]), 1.0)
        places = [i - 1 for start, stop in sequence.trained_spans for i in range(start, stop)]
        torch.testing.assert_close(logprobs, whole.logprobs[places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_beginning_that_rollouts_share_is_read_once_and_changes_nothing(model_path, name):
    # groups of three, dealt out of order; one prompt is the beginning of another, some completions
    # of one prompt begin alike, one is another's beginning, and two are the same
    prompts = [[7, 9, 11], [7, 9], [40, 3, 3, 50], [5]]
    completions = [s.token_ids[s.prompt_length :].tolist() for s in rollouts().sequences]
    completions[4] = [*completions[0][:2], 17, 18]
    completions[6] = completions[2][:-1]
    completions[7] = completions[3]
    made = [TokenSequence.of(prompts[i % 4], ids) for i, ids in enumerate(completions)]
    model = load_model(model_path(name), "float32", torch.device("cpu"))
    batch = pack(made)
    beginnings = {tuple(s.token_ids[:i]) for s in made for i in range(1, s.num_tokens + 1)}
    assert batch.input_ids.shape == (1, len(beginnings))
    together = token_logprobs(model, batch, 0.7).logprobs
    apart = torch.cat([token_logprobs(model, pack([r]), 0.7).logprobs for r in made])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    # the same completion twice: one row of logits each, and the same bits
    by_row = together.split([sequence.num_trained for sequence in made])
    assert torch.equal(by_row[3], by_row[7])
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
    found = accumulate_gradients(model, batches, objective, temperature=1.0, max_new_tokens=16)
    return [p.grad.clone() for p in model.parameters()], found.policy


@pytest.mark.parametrize("budget", [16, 1000])
def test_right_completions_add_their_mean_negative_log_likelihood(learner, budget):
    objective, made, coef, right_rows = OBJECTIVES["ppo"], rollouts(), 0.25, [1, 4, 7]
    (batches,) = batched(made, 1, budget, seed=3)
    policy, _ = gradient(learner, batches, objective)
    learner.zero_grad()
    right = [made.batch([row]) for row in right_rows]
    loss = supervised_gradients(learner, right, coef=coef)
    expected = [a + p.grad for a, p in zip(policy, learner.parameters(), strict=True)]

    made.rewards[right_rows] = 1.0
    made.mark_right(1.0)
    (batches,) = batched(made, 1, budget, seed=3)
    learner.zero_grad()
    options = {"temperature": 1.0, "max_new_tokens": 16, "right_nll_coef": coef}
    found = accumulate_gradients(learner, batches, objective, **options).right
    torch.testing.assert_close(found, loss)
    for parameter, value in zip(learner.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-4, atol=1e-6)

    made.rewards[:] = 0.0
    made.mark_right(1.0)
    (batches,) = batched(made, 1, budget, seed=3)
    nothing = accumulate_gradients(learner, batches, objective, **options).right
    assert nothing == 0


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_loss_and_gradient_do_not_depend_on_micro_batches(learner, name):
    objective, made = OBJECTIVES[name], rollouts()
    results = []
    for budget in (16, 40, 1000):
        (batches,) = batched(made, 1, budget, seed=3)
        if objective.kl_coef:
            batches = [replace(b, ref_logprobs=score(learner, b, 1.0)) for b in batches]
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


def batched(made: StepRollouts, number: int, budget: int, seed: int) -> list[list[Batch]]:
    minibatches = make_minibatches(made, number, budget, seed)
    return [[made.batch(rows) for rows in minibatch] for minibatch in minibatches]


def test_denominators_are_counted_over_the_optimizer_step():
    made = rollouts(5)
    batches = [made.batch([0, 1]), made.batch([2, 3, 4])]
    assert denominator(batches, OBJECTIVES["dapo"].aggregation, 10) == made.lengths.sum()
    assert denominator(batches, OBJECTIVES["grpo"].aggregation, 10) == 5
    assert denominator(batches, OBJECTIVES["dr_grpo"].aggregation, 10) == 50


def test_minibatches_deal_every_rollout_once():
    made = rollouts(13)
    minibatches = batched(made, 4, 64, seed=1)
    assert [sum(b.num_sequences for b in part) for part in minibatches] == [3, 3, 3, 4]
    dealt = sorted(a for part in minibatches for b in part for a in b.advantages.tolist())
    assert dealt == sorted(made.advantages.tolist())
    assert all(b.input_ids.numel() <= 64 for part in minibatches for b in part)


def test_columns_are_filled_and_read_by_row():
    made = rollouts(5)
    assert made.batch([1]).values is None and made.tokens_of([]).tolist() == []
    tokens = {row: torch.randn(int(made.lengths[row])) for row in range(5)}
    for rows in ([3, 0], [4, 1, 2]):
        made.fill("values", rows, torch.cat([tokens[row] for row in rows]))
    assert torch.equal(made.values, torch.cat([tokens[row] for row in range(5)]))
    batch = made.batch([2, 4])
    assert torch.equal(batch.values, torch.cat([tokens[2], tokens[4]]))
    assert torch.equal(batch.old_logprobs, batch.sampler_logprobs)
    ids = [made.sequences[row].token_ids[made.sequences[row].prompt_length :] for row in (2, 4)]
    assert batch.targets.tolist() == np.concatenate(ids).tolist()
    assert batch.cu_seqlens.tolist() == [0, len(ids[0]), len(ids[0]) + len(ids[1])]


def test_a_rollout_larger_than_the_budget_is_refused_with_the_setting():
    with pytest.raises(ValueError, match="raise update.token_budget or lower rollout.max_new"):
        split_by_tokens(rollouts(3).sequences, 2)


def test_a_gradient_that_is_not_finite_stops_before_the_step(learner):
    batch = rollouts(4).batch(range(4))
    batch.advantages[1] = torch.nan
    before = [p.clone() for p in learner.parameters()]
    optimizer = AdamW(learner.named_parameters(), lr=1.0)
    accumulate_gradients(learner, [batch], OBJECTIVES["dapo"], temperature=1.0, max_new_tokens=16)
    with pytest.raises(TrainingError, match="gradient norm is nan: the step was not taken"):
        optimizer.step(1.0)
    for a, b in zip(before, learner.parameters(), strict=True):
        assert torch.equal(a, b) and b.grad is None


def test_new_learner_is_the_model_on_disk(model_path, learner):
    for a, b in zip(new_learner("qwen2").parameters(), learner.parameters(), strict=True):
        assert torch.equal(a, b)


def test_causal_returns_are_those_of_the_policy_that_learns(learner):
    """loss = -sum_t logp_t Q_t over B, with Q_t = C_t r_t + Q_{t+1} and C_t = prod_{u <= t} w_u."""
    made = rollouts()
    old = [score(learner, made.batch([i]), 1.0) for i in range(len(made))]
    shift = torch.linspace(-0.3, 0.3, made.lengths.sum())
    made = replace(made, old_logprobs=torch.cat(old) + shift)
    batches = [made.batch([0, 1]), made.batch(range(2, len(made)))]
    learner.zero_grad()
    accumulate_gradients(
        learner,
        batches,
        OBJECTIVES["off_policy_causal"],
        temperature=1.0,
        max_new_tokens=16,
        causal_gamma=1.0,
    )
    found = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    loss = torch.zeros(())
    for i in range(len(made)):
        batch = made.batch([i])
        logprobs = token_logprobs(learner, batch, 1.0).logprobs
        weights = (logprobs - batch.old_logprobs).detach().exp().cumprod(0)
        returns = (weights * batch.advantages).flip(0).cumsum(0).flip(0)
        loss = loss - (logprobs * returns).sum() / len(made)
    loss.backward()
    largest = max(p.grad.abs().max() for p in learner.parameters()).item()
    for gradient, p in zip(found, learner.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5 * largest)
