import numpy as np
import pytest
import torch

from tests.kernels.backends import DEVICE
from tests.oracles import pass_at_k as oracle
from warpo.kernels import ops

GROUPS = np.array(
    [
        [1.0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0.25, -3, 7, 7, 1, 0.5],
        [2, 2, 2, 2, 2, 2],
        [100.5, 100, 99, 101, 100, 98],
    ],
    np.float32,
)
REWARDS = torch.from_numpy(GROUPS).flatten().to(DEVICE)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_training_is_the_mean_over_all_subsets(k):
    found = ops.pass_at_k_advantages(REWARDS, 6, k=k).view(-1, 6)
    for mine, group in zip(found.double().cpu().numpy(), GROUPS.astype(np.float64), strict=True):
        wanted = oracle.pass_at_k_training(group, k, 1e-6)
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)
        if set(group) == {0, 1}:
            wanted = oracle.binary_pass_at_k_training(group, k, 1e-6)
            np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", range(2, 7))
def test_pkpo_is_what_a_completion_adds_to_the_others(k):
    found = ops.pass_at_k_advantages(REWARDS, 6, k=k, method="pkpo").view(-1, 6)
    for mine, group in zip(found.double().cpu().numpy(), GROUPS.astype(np.float64), strict=True):
        np.testing.assert_allclose(mine, oracle.pkpo(group, k), rtol=1e-5, atol=1e-6)


def test_the_best_of_one_is_grpo():
    found = ops.pass_at_k_advantages(REWARDS, 6, k=1)
    wanted = ops.group_advantages(REWARDS, 6, std="population").advantages
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["pass_at_k_training", "pkpo"])
def test_where_every_k_have_the_same_best_nothing_is_learned(method):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.1, 0.1], device=DEVICE)
    assert (ops.pass_at_k_advantages(rewards, 6, k=3, method=method) == 0).all()


@pytest.mark.parametrize("method", ["pass_at_k_training", "pkpo"])
def test_large_groups_and_a_nan_stay_apart(method):
    rewards = (torch.rand(3, 300, device=DEVICE) < 0.1).float()
    rewards[1, 5] = torch.nan
    found = ops.pass_at_k_advantages(rewards.flatten(), 300, k=150, method=method).view(3, 300)
    assert found[[0, 2]].isfinite().all() and found[1].isnan().any()
    empty = torch.zeros(0, device=DEVICE)
    assert ops.pass_at_k_advantages(empty, 4, k=2, method=method).shape == (0,)


R = torch.zeros(6)


@pytest.mark.parametrize(
    "rewards, size, options, message",
    [
        (R, 4, {"k": 2}, "group_size must divide the number of rewards, 6, got 4"),
        (R[None], 3, {"k": 2}, r"rewards must be \(B,\), got \(1, 6\)"),
        (R, 3, {"k": 0}, r"k must be in \[1, group_size = 3\] with method='pass_at_k_training'"),
        (R, 3, {"k": 4}, r"k must be in \[1, group_size = 3\].*got 4"),
        (R, 3, {"k": 1, "method": "pkpo"}, r"k must be in \[2, group_size = 3\]"),
        (R, 3, {"k": 2, "method": "best"}, "method must be one of pass_at_k_training, pkpo"),
        (R, 3, {"k": 2, "eps": -1.0}, "eps must be >= 0, got -1.0"),
        (R.clone().requires_grad_(), 3, {"k": 2}, "rewards requires grad"),
    ],
)
def test_bad_arguments_are_named(rewards, size, options, message):
    with pytest.raises(ValueError, match=message):
        ops.pass_at_k_advantages(rewards, size, **options)
