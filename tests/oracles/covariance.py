"""Choice of Clip-Cov and KL-Cov, https://arxiv.org/abs/2505.22617 eq. 10, 11 and 13."""

from __future__ import annotations

import math
from collections.abc import Sequence


def covariances(logprobs: Sequence[float], advantages: Sequence[float]) -> list[float]:
    """Eq. 10, of the tokens of an optimizer step."""
    n = len(logprobs)
    mean_logprob, mean_advantage = math.fsum(logprobs) / n, math.fsum(advantages) / n
    return [
        (logprob - mean_logprob) * (advantage - mean_advantage)
        for logprob, advantage in zip(logprobs, advantages, strict=True)
    ]


def candidates(covariance: Sequence[float], low: float, high: float) -> set[int]:
    """Of eq. 11, which draws floor(r N) of them."""
    return {i for i, value in enumerate(covariance) if low <= value <= high}


def largest(covariance: Sequence[float], share: float) -> set[int]:
    """Eq. 13, of values that differ, at least one."""
    ranked = sorted(range(len(covariance)), key=lambda i: -covariance[i])
    return set(ranked[: max(1, math.floor(share * len(covariance)))])
