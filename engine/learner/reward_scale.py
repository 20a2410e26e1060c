"""Normalisation and clipping of the rewards that advantages are made of.

    r <- clip((r - mean) / (std + 1e-8), -c, c)

with mean and sample standard deviation of the rewards of the step, or of all rewards up to it.

Source: reward normalisation and clipping of REINFORCE++, https://arxiv.org/abs/2501.03262; moments
of parts: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", eq. 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.errors import RewardError
from warpo.engine.models.step_rollouts import StepRollouts

EPSILON = 1e-8


@dataclass
class RewardMoments:
    """Number, mean and sum of squared distances from the mean, of rewards."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, rewards: Tensor) -> RewardMoments:
        """The moments of these and further rewards, (B,) float64."""
        new, mean = len(rewards), rewards.mean().item()
        count, distance = self.count + new, mean - self.mean
        return RewardMoments(
            count,
            self.mean + distance * new / count,
            self.squares
            + (rewards - mean).square().sum().item()
            + distance**2 * self.count * new / count,
        )

    def scaled(self, rewards: Tensor) -> Tensor:
        """(r - mean) / (std + 1e-8)."""
        std = (self.squares / max(self.count - 1, 1)) ** 0.5
        return (rewards - self.mean) / (std + EPSILON)


def scale(
    algorithm: Algorithm, rollouts: StepRollouts, earlier: RewardMoments
) -> tuple[Tensor, Tensor | None, RewardMoments]:
    """The rewards of a step as advantages read them, (B,) float64, those of its greedy completions
    by the same scale, and the moments with those of this step.

    Raises:
        RewardError: the rewards are of steps.
    """
    rewards, greedy = rollouts.rewards.double(), rollouts.baseline_rewards
    normalize, clip = algorithm.reward_normalize, algorithm.reward_clip
    if normalize == "none" and clip is None:
        return rewards, greedy, earlier
    if rollouts.step_rewards is not None:
        setting = f"reward.normalize = {normalize!r}" if clip is None else f"reward.clip = {clip:g}"
        raise RewardError(
            f"{setting} scales rewards of completions, and a source scores steps: let it return a "
            "number for each completion, or take the setting out"
        )
    moments = earlier
    if normalize != "none":
        moments = (earlier if normalize == "running" else RewardMoments()).with_more(rewards)

    def scaled(values: Tensor) -> Tensor:
        values = values.double() if normalize == "none" else moments.scaled(values.double())
        return values if clip is None else torch.clamp(values, -clip, clip)

    return scaled(rewards), None if greedy is None else scaled(greedy), moments
