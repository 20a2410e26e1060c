"""Clip-Cov and KL-Cov: which tokens are chosen, and what the gradient makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.learner.test_critic import rollouts
from tests.oracles import covariance as oracle
from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.policy import load_config
from warpo.engine.config.resolve import find
from warpo.engine.learner.covariance import by_covariance, choose
from warpo.engine.learner.step_metrics import step_metrics
from warpo.engine.models.batch import Batch
from warpo.engine.models.score import score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.ranks import Ranks
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy.build import build

ROWS = ("clip_cov", "kl_cov")
# a few of the 35 tokens of `rollouts`
FEW = {"covariance_share": 0.15, "covariance_range": (0.05, 5.0)}


def scored(model: torch.nn.Module | None = None) -> StepRollouts:
    """Rollouts whose policy has moved since it drew them, of the model's logprobs if given."""
    made = rollouts()
    generator = torch.Generator().manual_seed(3)
    if model is None:
        made.old_logprobs = -4 * torch.rand(len(made.advantages), generator=generator)
        return made
    for row in range(len(made)):
        now = score(model, made.batch([row]), 1.0)
        made.fill("old_logprobs", [row], now + 0.2 * torch.randn(len(now), generator=generator))
    return made


def split(made: StepRollouts, rows: Sequence[Sequence[int]]) -> list[Batch]:
    return [made.batch(part) for part in rows]


WHOLE, SPLIT = [[4, 0, 6, 2, 1, 3, 5]], [[1, 0], [6, 5, 4], [3], [2]]


@given(
    values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=60, unique=True),
    share=st.floats(0.001, 1.0),
    low=st.floats(-2, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_tokens_that_are_chosen(
    values: list[float], share: float, low: float, seed: int
) -> None:
    covariance = torch.tensor(values, dtype=torch.float64)
    settings = {"covariance_share": share, "covariance_range": (low, low + 1)}
    top = choose(find("kl_cov").replace(**settings), covariance, (seed, 3, 1))
    assert set(top.nonzero()[:, 0].tolist()) == oracle.largest(values, share)
    drawn = choose(find("clip_cov").replace(**settings), covariance, (seed, 3, 1))
    allowed = oracle.candidates(values, low, low + 1)
    assert set(drawn.nonzero()[:, 0].tolist()) <= allowed
    assert drawn.sum() == min(max(1, int(share * len(values))), len(allowed))


def test_every_candidate_is_drawn_as_often_and_each_optimizer_step_draws_anew() -> None:
    row = find("clip_cov").replace(covariance_share=0.25, covariance_range=(1.0, 5.0))
    covariance = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    draws = [choose(row, covariance, (seed, 1, update)) for seed in range(500) for update in (0, 1)]
    assert any(not torch.equal(*pair) for pair in zip(draws[::2], draws[1::2], strict=True))
    counts = torch.stack(draws).sum(0)
    assert counts[[0, 6, 7]].sum() == 0
    # 2 of 5 candidates in 1000 draws: 400 +- 4 standard deviations of 15.5
    assert counts[1:6].min() > 338 and counts[1:6].max() < 462


def changed(row: Algorithm, batches: list[Batch], made: StepRollouts) -> tuple[Tensor, Tensor]:
    """The report, and what was chosen in the order of the columns."""
    found, report = by_covariance(
        row, torch.nn.Identity(), batches, temperature=1.0, seed=(5, 2, 0)
    )
    chosen = torch.zeros(len(made.advantages), dtype=torch.bool)
    for before, after in zip(batches, found, strict=True):
        assert torch.equal(before.old_logprobs, after.old_logprobs)
        chosen[before.token_index] = before.advantages != after.advantages
    return report, chosen


def test_the_choice_does_not_depend_on_the_split_into_micro_batches() -> None:
    made, row = scored(), find("clip_cov").replace(**FEW)
    reports = [changed(row, split(made, rows), made) for rows in (WHOLE, SPLIT)]
    for whole, parts in zip(*reports, strict=True):
        assert torch.equal(whole, parts)
    expected = oracle.covariances(made.old_logprobs.tolist(), made.advantages.tolist())
    (mean, share), chosen = reports[0]
    torch.testing.assert_close(mean.item(), sum(expected) / len(expected))
    count = int(0.15 * len(expected))
    assert chosen.sum() == count and share == count / len(expected)
    allowed = oracle.candidates(expected, *FEW["covariance_range"])
    assert count < len(allowed) and set(chosen.nonzero()[:, 0].tolist()) <= allowed


def test_several_processes_choose_of_the_tokens_of_all() -> None:
    made, row = scored(), find("clip_cov").replace(**FEW)
    rows = [0, 1, 2], [3, 4, 5, 6]
    (_, expected), total = changed(row, [made.batch(sum(rows, []))], made), 0
    sent: list[Tensor] = []

    class Two(Ranks):
        """Both processes one after the other: the first round sends, the second receives."""

        size = 2

        def gather(self, items):
            sent.append(items[0])
            return sent[:2] if len(sent) > 2 else [items[0]] * 2

    for _ in range(2):
        for ranks_rank, mine in enumerate(rows):
            ranks = Two()
            ranks.rank = ranks_rank
            batch = made.batch(mine)
            (found,), _ = by_covariance(
                row, torch.nn.Identity(), [batch], temperature=1.0, seed=(5, 2, 0), ranks=ranks
            )
            if len(sent) > 2:
                taken = found.advantages != batch.advantages
                assert torch.equal(taken, expected[batch.token_index])
                total += int(taken.sum())
    assert total == expected.sum() > 0


@pytest.mark.parametrize(
    ("update", "aggregation"), [(0, "token-mean"), (1, "sequence-mean-token-mean")]
)
@pytest.mark.parametrize("name", ROWS)
def test_the_gradient_is_that_of_the_formula_in_float64(
    folder: Path, name: str, aggregation: str, update: int
) -> None:
    """Eq. 12 and 14, for one and for several micro-batches."""
    words = ["--algorithm", name, "--sampler", "transformers", "--update.epochs", "2"]
    words += ["--loss.covariance_share", "0.15", "--loss.aggregation", aggregation]
    words += ["--loss.kl_coef", "0", "--rollout.temperature", "1"]
    words += ["--loss.covariance_range", "0.05", "5"] if name == "clip_cov" else []
    config = load_config(folder / "config.yaml", words)
    found: list[dict[str, Tensor]] = []
    with build(config, Run(log=NoLog())) as (_, learner, _):
        model = learner.model
        made = scored(model)
        learner.optimizer.register_step_pre_hook(
            lambda *_: found.append({n: p.grad.clone() for n, p in model.named_parameters()})
        )
        plain = AutoModelForCausalLM.from_pretrained(folder / "model").double()
        weights = {n: p.clone() for n, p in model.named_parameters()}
        results = []
        for rows in (WHOLE, SPLIT):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(weights[n])
            results.append(learner.train_step(split(made, rows), 2, update))
    expected, chosen = formula(plain, made, learner.algorithm, (config.seed, 2, update))
    for gradients, result in zip(found, results, strict=True):
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        for n, gradient in expected.items():
            torch.testing.assert_close(
                gradients[n].double(), gradient, rtol=0, atol=2e-5 * largest, msg=n
            )
        metrics = step_metrics([result])
        if name == "kl_cov" and update == 0:
            assert result.covariance is None and "loss/covariance_kl" not in metrics
        else:
            torch.testing.assert_close(
                metrics["covariance/chosen_frac"], chosen / len(made.advantages)
            )
        assert ("loss/covariance_kl" in metrics) == (name == "kl_cov" and update == 1)


def formula(
    plain: torch.nn.Module, made: StepRollouts, row: Algorithm, seed: tuple[int, int, int]
) -> tuple[dict[str, Tensor], int]:
    logprobs = []
    for sequence in made.sequences:
        ids, start = torch.from_numpy(sequence.token_ids), sequence.prompt_length
        logits = plain(ids[None]).logits[0, start - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0])
    flat, old, advantages = torch.cat(logprobs), made.old_logprobs.double(), made.advantages
    policy = old if seed[-1] == 0 else flat.detach()
    covariance = oracle.covariances(policy.tolist(), advantages.tolist())
    ratio = (flat - old).exp()
    if row.covariance == "clip":
        chosen = choose(row, torch.tensor(covariance, dtype=torch.float64), seed)
        losses = -ratio * advantages.masked_fill(chosen, 0)
        count = int(chosen.sum())
    else:
        losses, top = -ratio * advantages, sorted(oracle.largest(covariance, row.covariance_share))
        count = len(top)
        if seed[-1] > 0:
            # |logp - old| of listing 1
            losses = losses.index_add(0, torch.tensor(top), (flat - old).abs()[top])
    assert count > 1
    if row.objective.aggregation == "token-mean":
        losses.mean().backward()
    else:
        parts = losses.split(made.lengths.tolist())
        torch.stack([part.mean() for part in parts]).mean().backward()
    return {name: p.grad for name, p in plain.named_parameters()}, count


def test_a_chosen_token_keeps_its_kl_and_its_place_in_the_denominator() -> None:
    made, row = scored(), find("clip_cov").replace(**FEW)
    made.ref_logprobs = made.old_logprobs - 0.1
    batches = split(made, SPLIT)
    found, _ = by_covariance(row, torch.nn.Identity(), batches, temperature=1.0, seed=(5, 2, 0))
    for before, after in zip(batches, found, strict=True):
        assert after == replace(before, advantages=after.advantages)
        assert after.num_trained == before.num_trained
