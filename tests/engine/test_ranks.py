"""Two ranks with half of a step each, in two threads, have the gradient of one with all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.learner.test_critic import rollouts, settings
from tests.engine.learner.test_losses import SCALAR, make_config, make_examples
from warpo.engine.config.offline import LOSS_KEYS
from warpo.engine.learner.critic import Critic
from warpo.engine.learner.optimizer import AdamW, gradient_norm
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.model import load_model
from warpo.engine.models.scalar import load_scalar_model
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.trainers.offline.objectives import make_objective, micro_batches
from warpo.kernels.objectives import OBJECTIVES

CPU = torch.device("cpu")
# transformers patches torch while it loads a model
LOADING = threading.Lock()


class ThreadRanks(Ranks):
    """One of two threads that exchange what they hold."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self._barrier, self._board = rank, barrier, board

    def _exchange(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        both = list(self._board)
        self._barrier.wait()
        return both

    def sum(self, value: Any) -> Any:
        first, second = self._exchange(value)
        return first + second

    def gather(self, items: Sequence[Any]) -> list[Any]:
        return [item for part in self._exchange(items) for item in part]

    def sum_gradients(self, parameters: Any) -> None:
        parameters = list(parameters)
        both = self._exchange([p.grad for p in parameters])
        for parameter, *grads in zip(parameters, *both, strict=True):
            parameter.grad = torch.stack(grads).sum(0)


def on_two_ranks(work: Callable[[Ranks], Any]) -> list[Any]:
    """Return the results of `work` on each."""
    barrier, board, results = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_a_policy_step_and_a_shared_critic(model_path: Callable[[str], str], name: str) -> None:
    path, made = model_path("qwen2"), rollouts(6)
    objective = OBJECTIVES[name].replace(kl_coef=0.0)
    halves = [made.batch(range(4))], [made.batch(range(4, 6))]

    def work(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        with LOADING:
            policy = load_model(path, "float32", CPU)
            critic = Critic(settings(path, model="shared"), policy, ranks)
        batches = [*halves[0], *halves[1]] if ranks.size == 1 else halves[ranks.rank]
        found = accumulate_gradients(
            policy,
            batches,
            objective,
            temperature=1.0,
            max_new_tokens=9,
            critic=critic,
            ranks=ranks,
        )
        ranks.sum_gradients(policy.parameters())
        return gradients(policy), found.policy, found.values

    whole = work(ONE_RANK)
    for found in on_two_ranks(work):
        assert_same(found[0], whole[0])
        for a, b in zip(found[1:], whole[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", LOSS_KEYS)
def test_a_step_on_given_data(algorithm: str, model_path: Callable[[str], str]) -> None:
    path, examples = model_path("qwen2"), make_examples(algorithm)[:4]
    if algorithm == "sft" or algorithm in SCALAR:
        for example in examples:
            object.__setattr__(example, "ref_logprobs", ())
    objective = make_objective(make_config(algorithm, path))

    def work(ranks: Ranks) -> tuple[Tensor, Tensor]:
        load = load_scalar_model if algorithm in SCALAR else load_model
        with LOADING:
            model = load(path, "float32", CPU)
        if algorithm in SCALAR:
            nn.init.constant_(model.score.weight, 0.1)
        mine = examples if ranks.size == 1 else (examples[:1], examples[1:])[ranks.rank]
        metrics = objective.gradients(model, micro_batches(mine, algorithm, 1000), ranks)
        ranks.sum_gradients(model.parameters())
        return gradients(model), metrics

    whole = work(ONE_RANK)
    for gradient, metrics in on_two_ranks(work):
        assert_same(gradient, whole[0])
        torch.testing.assert_close(metrics, whole[1], rtol=1e-5, atol=1e-6)


def test_the_optimizer_clips_by_the_norm_of_the_summed_gradient() -> None:
    grads = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])

    def work(ranks: Ranks) -> tuple[float, Tensor]:
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = grads[ranks.rank].clone()
        optimizer = AdamW([("weight", weight)], lr=1.0, ranks=ranks)
        update = optimizer.step(max_grad_norm=1.0)
        return update.grad_norm.item(), optimizer.state[weight]["exp_avg"] / (1 - 0.9)

    for norm, moment in on_two_ranks(work):
        assert norm == pytest.approx(5.0)
        torch.testing.assert_close(moment, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)
    assert gradient_norm([]) == 0
