"""One optimizer step of a row: what the loss is given beside rollouts and advantages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.learner.test_critic import rollouts
from warpo.engine.config.policy import load_config
from warpo.engine.errors import TrainingError
from warpo.engine.models.score import score
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build


def test_ppo_with_a_kl_penalty_takes_it_to_the_policy_that_the_step_began_with(
    folder: Path,
) -> None:
    """https://arxiv.org/abs/1707.06347 eq. 8, with the coefficient as it has adapted."""
    words = ["--algorithm", "ppo_kl", "--sampler", "transformers"]
    config = load_config(folder / "config.yaml", words)
    made = rollouts()
    with build(config, Run(log=NoLog())) as (_, learner, _):
        model = learner.model
        learner.adaptive.kl_coef = 3.0
        for row in range(len(made)):
            now = score(model, made.batch([row]), 1.0)
            noise = torch.randn(len(now), generator=torch.Generator().manual_seed(row))
            # the policy has moved since the step began
            made.fill("old_logprobs", [row], now + 0.2 * noise)
        found = {}
        learner.optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters()})
        )
        plain = AutoModelForCausalLM.from_pretrained(folder / "model").double()
        rows = range(len(made))
        learner.train_step([made.batch(rows[:3]), made.batch(rows[3:])], 1, 1)
    losses = []
    for row, sequence in enumerate(made.sequences):
        ids, start = torch.from_numpy(sequence.token_ids), sequence.prompt_length
        logits = plain(ids[None]).logits[0, start - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        tokens = made.tokens_of([row])
        log_ratio = logprobs - made.old_logprobs[tokens]
        # k3 of KL(old, new), of whose samples these are
        kl = log_ratio.exp() - 1 - log_ratio
        losses.append(-log_ratio.exp() * made.advantages[tokens] + 3.0 * kl)
    torch.cat(losses).mean().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name].double(), gradient, rtol=0, atol=2e-5 * largest, msg=name
        )


def test_a_policy_gradient_that_is_not_finite_leaves_the_policy(folder: Path) -> None:
    words = ["--algorithm", "ppo", "--sampler", "transformers"]
    config = load_config(folder / "config.yaml", words)
    made = rollouts()
    with build(config, Run(log=NoLog())) as (_, learner, _):
        batch = made.batch(range(len(made)))
        batch.advantages[0] = torch.nan
        before = [p.clone() for p in learner.model.parameters()]
        with pytest.raises(TrainingError, match="the step was not taken. Lower update.lr"):
            learner.train_step([batch], 1, 0)
    for a, b in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(a, b) and b.grad is None
