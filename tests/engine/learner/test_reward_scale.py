"""Rewards as advantages read them: normalised over a step or a run, and clipped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.learner.test_advantages import estimated, rollouts, sample
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.errors import RewardError
from warpo.engine.learner.advantages import AdaptiveState, estimate

PLAIN = ALGORITHMS["reinforce"].replace(baseline="none")


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("normalize", ["none", "batch", "running"])
def test_rewards_are_normalised_by_the_step_or_by_all_steps_and_clipped(
    normalize: str, clip: float | None
) -> None:
    row = PLAIN.replace(reward_normalize=normalize, reward_clip=clip)
    state, seen = AdaptiveState(0.0), np.empty(0)
    for seed, groups in enumerate([3, 1, 4]):
        s = sample(seed, groups=groups)
        seen = np.concatenate([seen, s.rewards])
        over = {"none": None, "batch": s.rewards, "running": seen}[normalize]
        expected = s.rewards
        if over is not None:
            expected = (expected - over.mean()) / (over.std(ddof=1) + 1e-8)
        if clip is not None:
            assert groups == 1 or (abs(expected) > clip).any()
            expected = expected.clip(-clip, clip)
        found, _ = estimated(row, s, state)
        assert found.advantages is not None
        firsts = found.advantages[found.cu_seqlens[:-1].long()].numpy()
        np.testing.assert_allclose(firsts, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.rewards.numpy(), s.rewards)
        again = AdaptiveState(0.0)
        again.load_state_dict(state.state_dict())
        assert again == state
        state = again


def test_the_greedy_completion_is_on_the_same_scale() -> None:
    """So a completion with the reward of the greedy one has advantage 0."""
    s = sample(3)
    s = replace(s, greedy_rewards=s.rewards)
    found, _ = estimated(ALGORITHMS["remax"].replace(reward_normalize="batch", reward_clip=1.0), s)
    assert found.advantages is not None and not found.advantages.any()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"reward_normalize": "batch"}, "reward.normalize = 'batch'"),
        ({"reward_clip": 2}, "clip = 2"),
    ],
)
def test_rewards_of_steps_are_refused(change: dict[str, object], setting: str) -> None:
    with pytest.raises(RewardError, match=f"{setting} .* and a source scores steps"):
        estimate(PLAIN.replace(**change), rollouts(sample(1), steps=True), AdaptiveState(0.0))
