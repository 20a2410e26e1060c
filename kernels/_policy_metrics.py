"""The vector of metrics that the policy losses return: names, means, sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

METRICS = (
    "policy_loss",
    "kl_loss",
    "entropy_loss",
    "tokens",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "ratio",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "kl",
    "entropy",
    "correction",
    "corrected",
    "log_ratio",
)


def policy_metrics(metrics: Tensor) -> dict[str, float]:
    """The metrics vector, or the sum of several, as means over tokens. Reads the device once.

    Returns:
        loss/policy, loss/kl, loss/entropy: as they enter the loss, before their coefficients.
            ratio/clip_frac_low, _high, _dual: share of tokens at which that bound is active.
            ratio/mean, ratio/min, ratio/max: at the level of the objective. kl/approx: k3 of old
            against new policy. kl/ref: the estimator against the reference. entropy/mean: nats.
            correction/mean: of the weights; correction/frac: share of them that a bound changed, or
            that are masked as NaN. All 0 without tokens.
    """
    row = dict(zip(METRICS, metrics.tolist(), strict=True))
    tokens = max(row["tokens"], 1.0)
    some = row["tokens"] > 0
    return {
        "loss/policy": row["policy_loss"],
        "loss/kl": row["kl_loss"],
        "loss/entropy": row["entropy_loss"],
        "ratio/clip_frac_low": row["clipped_low"] / tokens,
        "ratio/clip_frac_high": row["clipped_high"] / tokens,
        "ratio/clip_frac_dual": row["clipped_dual"] / tokens,
        "ratio/mean": row["ratio"] / tokens,
        "ratio/min": row["ratio_min"] if some else 0.0,
        "ratio/max": row["ratio_max"] if some else 0.0,
        "kl/approx": row["approx_kl"] / tokens,
        "kl/ref": row["kl"] / tokens,
        "entropy/mean": row["entropy"] / tokens,
        "correction/mean": row["correction"] / tokens,
        "correction/frac": row["corrected"] / tokens,
    }


def sum_metrics(metrics: Sequence[Tensor]) -> Tensor:
    """The metrics vectors of several micro-batches as one: sums, and the extremes of the ratio."""
    stacked = torch.stack(list(metrics))
    total = stacked.sum(0)
    low, high = METRICS.index("ratio_min"), METRICS.index("ratio_max")
    total[low], total[high] = stacked[:, low].amin(), stacked[:, high].amax()
    return total
