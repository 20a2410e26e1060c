import numpy as np
import pytest
import torch

from tests.kernels.backends import DEVICE, each_backend
from tests.oracles.group_advantages import group_advantages as one_reward
from tests.tolerance import SUM_RELATIVE, assert_close
from warpo.kernels import ops


def gdpo(rewards: np.ndarray, ids: np.ndarray, weights: np.ndarray, whiten: bool) -> np.ndarray:
    """https://arxiv.org/abs/2601.05242 section 3."""
    apart = [one_reward(column, ids) for column in rewards.T]
    total = (weights[:, None] * np.stack(apart)).sum(0)
    return (total - total.mean()) / (total.std(ddof=1) + 1e-6) if whiten else total


@each_backend
@pytest.mark.parametrize("by", ["size", "ids", "mask"])
@pytest.mark.parametrize("whiten", [True, False])
def test_values_equal_the_oracle(backend, by, whiten):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(24, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.01])
    rewards[:4, 1] = 2.5  # of one group no difference in one reward
    weights = torch.tensor([1.0, 0.5, 2.0])
    ids, counts = torch.arange(24) // 4, torch.ones(24, dtype=torch.bool)
    where = {"group_size": 4}
    if by == "ids":
        ids = torch.randint(-1, 5, (24,), generator=generator)
        counts = ids >= 0
        where = {"group_ids": ids.to(DEVICE), "num_groups": 5, "mask": counts.to(DEVICE)}
    if by == "mask":
        counts[[1, 7, 20]] = False
        where["mask"] = counts.to(DEVICE)
    kept = counts.numpy()
    exact = (x.double().numpy() for x in (rewards[counts], ids[counts], weights))
    wanted = gdpo(*exact, whiten)
    rewards[~counts] = torch.nan
    found = ops.decoupled_advantages(
        rewards.to(DEVICE), **where, weights=weights.to(DEVICE), whiten=whiten, backend=backend
    ).cpu()
    assert (found[~counts] == 0).all() and kept.any()
    assert_close(
        found[counts],
        torch.from_numpy(wanted),
        relative=SUM_RELATIVE,
        absolute=5e-5,
        what="advantages",
    )


@each_backend
def test_rewards_with_one_sum_are_told_apart(backend):
    """Of two rewards of 0 and 1, (0, 1) and (1, 0) have one sum: GRPO sees no difference."""
    rewards = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1]], device=DEVICE)
    assert (ops.group_advantages(rewards.sum(1), 4, backend=backend).advantages == 0).all()
    weights = torch.tensor([2.0, 1.0], device=DEVICE)
    found = ops.decoupled_advantages(rewards, 4, weights=weights, backend=backend)
    assert found[1] > 1 and (found[[0, 2, 3]] < 0).all()
    assert ops.decoupled_advantages(rewards[:0], 4, backend=backend).shape == (0,)


R = torch.zeros(6, 2)


@pytest.mark.parametrize(
    "rewards, options, message",
    [
        (R[:, 0], {}, r"rewards must be \(B, K\) with K >= 1, got \(6,\)"),
        (R[:, :0], {}, r"rewards must be \(B, K\) with K >= 1, got \(6, 0\)"),
        (R, {"weights": torch.ones(3)}, r"weights must be of shape \(2,\), got \(3,\)"),
        (R, {"group_size": 4}, "group_size must divide"),
        (R.clone().requires_grad_(), {}, "rewards requires grad"),
        (R, {"std": "robust"}, "std must be one of"),
    ],
)
def test_bad_arguments_are_named(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        ops.decoupled_advantages(rewards, **{"group_size": 3} | options)
