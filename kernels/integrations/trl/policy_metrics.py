"""TRL's metrics of the policy losses: the shares of clipped tokens, the KL, the entropy."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels._policy_metrics import METRICS

# One figure, that of the whole batch.
TOTALS = {"cispo": "cispo_clip_ratio"}


class Batch(NamedTuple):
    """A micro-batch after the forward pass: B completions of T tokens.

    Attributes:
        logprobs, entropy: (B, T), differentiable.
        old_logprobs: (B, T); None where this policy is the old one.
        mask: (B, T) bool.
        advantages: (B, 1) or (B, T).
        mode: "train" or "eval".
        accumulated: number of micro-batches whose gradients are added up.
    """

    logprobs: Tensor
    entropy: Tensor
    old_logprobs: Tensor | None
    mask: Tensor
    advantages: Tensor
    mode: str
    accumulated: float


def beyond(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Tokens whose gradient a bound takes: the lower if the advantage is below 0, else the upper.

    Args:
        log_ratio: is overwritten.
        low, high: logarithms of the bounds, low <= 0 <= high.
    """
    return log_ratio.sub_(log_ratio.clamp(low, high)) * advantages > 0


def log_bounds(low: float, high: float) -> tuple[float, float]:
    """Logarithms of 1 - low and 1 + high."""
    return math.log1p(-low) if low < 1 else -math.inf, math.log1p(high)


def _one_each(trainer: Any, batch: Batch) -> bool:
    """True if a sequence has one ratio and one advantage, and so is clipped or is not."""
    return trainer.importance_sampling_level == "sequence" and batch.advantages.shape[1] == 1


def _clipped(trainer: Any, batch: Batch) -> list[Tensor]:
    """Count how often a bound is active in each sequence, (B,): per token, or once if the sequence
    has one ratio and one advantage. With it, where there are two bounds, what tells them apart: the
    advantage of the sequence, or how often it is the lower one. Nothing where the ratio is 1, which
    is between all bounds.
    """
    if batch.old_logprobs is None:
        return []
    ratio = batch.logprobs.detach().float() - batch.old_logprobs
    if trainer.importance_sampling_level == "sequence":
        # masked slots may hold NaN; where others do, so does the loss
        flags = batch.mask.view(torch.uint8)  # a faster factor than bool
        total, tokens = ratio.mul_(flags).nansum(-1), batch.mask.sum(-1)
        ratio = (total / tokens.clamp_(min=1))[:, None]
    if trainer.loss_type == "cispo":
        active = (ratio > math.log(trainer.epsilon_high)) & (batch.advantages > 0)
    else:
        low, high = log_bounds(trainer.epsilon_low, trainer.epsilon_high)
        active = beyond(ratio, batch.advantages, low, high)
    one_each = _one_each(trainer, batch)
    if not one_each:
        active = active & batch.mask
    often = active[:, 0] if one_each else active.sum(-1)
    if trainer.loss_type == "cispo":
        return [often]
    if batch.advantages.shape[1] == 1:
        return [often, batch.advantages[:, 0]]
    return [often, (active & (batch.advantages < 0)).sum(-1)]


def log(trainer: Any, batch: Batch, metrics: Tensor) -> None:
    """Means over the tokens of all processes, or over their sequences where TRL has one value a
    sequence; read from the device once.
    """
    loss_type, found = trainer.loss_type, trainer._metrics[batch.mode]
    columns = [] if loss_type == "sapo" else _clipped(trainer, batch)
    one_each = _one_each(trainer, batch)
    if columns and not one_each and loss_type not in TOTALS:
        columns.append(batch.mask.sum(-1))
    rows = trainer.accelerator.gather(torch.cat([metrics, *columns])[None]).tolist()
    kl, entropy, tokens = (
        sum(row[METRICS.index(name)] for row in rows) for name in ("kl", "entropy", "tokens")
    )
    if trainer.beta != 0.0:
        found["kl"].append(kl / max(tokens, 1.0))
    found["entropy"].append(entropy / max(tokens, 1.0))
    if loss_type == "sapo":
        return
    values = _columns(rows, len(columns)) or [[0.0], [0.0], [tokens]]
    if loss_type in TOTALS:
        count = len(values[0]) if one_each else max(tokens, 1.0)
        found[TOTALS[loss_type]].append(sum(values[0]) / count)
    else:
        counts = [1.0] * len(values[0]) if one_each else values[2]
        often, second = values[:2]
        low = second
        if batch.advantages.shape[1] == 1:
            low = [n if x < 0 else 0.0 for n, x in zip(often, second, strict=True)]
        log_clipped(found, counts, low, often)


def _columns(rows: list[list[float]], number: int) -> list[list[float]]:
    """The columns behind the metrics, each of the sequences of all processes."""
    if number == 0:
        return []
    size = (len(rows[0]) - len(METRICS)) // number
    starts = (len(METRICS) + i * size for i in range(number))
    return [[x for row in rows for x in row[start : start + size]] for start in starts]


def log_clipped(
    found: dict[str, list[float]], counts: list[float], low: list[float], both: list[float]
) -> None:
    """TRL's shares of clipped tokens, by the lower bound and by both. The extremes are over
    sequences that have tokens.
    """
    total = max(sum(counts), 1.0)
    found["clip_ratio/low_mean"].append(sum(low) / total)
    found["clip_ratio/high_mean"].append((sum(both) - sum(low)) / total)
    found["clip_ratio/region_mean"].append(sum(both) / total)
    lows = (x / count for x, count in zip(low, counts, strict=True) if count)
    highs = ((x - y) / count for x, y, count in zip(both, low, counts, strict=True) if count)
    found["clip_ratio/low_min"].append(min(lows, default=math.nan))
    found["clip_ratio/high_max"].append(max(highs, default=math.nan))
