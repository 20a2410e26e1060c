"""One optimizer step of a row: what the loss is given beside rollouts and advantages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.test_critic import rollouts
from warpo.engine.batch import pack
from warpo.engine.build import build
from warpo.engine.config import load_config
from warpo.engine.errors import TrainingError
from warpo.engine.step import score
from warpo.engine.train import train_step


def test_ppo_with_a_kl_penalty_takes_it_to_the_policy_that_the_step_began_with(
    folder: Path,
) -> None:
    """https://arxiv.org/abs/1707.06347 eq. 8, with the coefficient as it has adapted."""
    words = ["--algorithm", "ppo_kl", "--sampler", "transformers"]
    config = load_config(folder / "config.yaml", words)
    parts = build(config)
    with parts.rewards:
        parts.adaptive.kl_coef = 3.0
        made = []
        for rollout in rollouts():
            now = score(parts.model, pack([rollout]), 1.0)
            noise = torch.randn(len(now), generator=torch.Generator().manual_seed(len(made)))
            # the policy has moved since the step began
            made.append(replace(rollout, old_logprobs=now + 0.2 * noise))
        found = {}
        parts.optimizer.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in parts.model.named_parameters()})
        )
        plain = AutoModelForCausalLM.from_pretrained(folder / "model").double()
        train_step(config, parts, [pack(made[:3]), pack(made[3:])], 1, 1)
    losses = []
    for rollout in made:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion.token_ids])
        targets = torch.tensor(rollout.completion.token_ids)[:, None]
        logits = plain(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        log_ratio = logits.log_softmax(-1).gather(1, targets)[:, 0] - rollout.old_logprobs
        losses.append(-log_ratio.exp() * rollout.advantages + 3.0 * log_ratio**2 / 2)
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
    parts = build(config)
    with parts.rewards:
        batch = pack(rollouts())
        batch.advantages[0] = torch.nan
        before = [p.clone() for p in parts.model.parameters()]
        with pytest.raises(TrainingError, match="the step was not taken. Lower update.lr"):
            train_step(config, parts, [batch], 1, 0)
    for a, b in zip(before, parts.model.parameters(), strict=True):
        assert torch.equal(a, b) and b.grad is None
