"""What TRL logs of the policy losses: the shares of clipped tokens, the KL, the entropy."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels.policy_metrics import METRICS


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


def log_ratio(batch: Batch) -> Tensor:
    """(B, T) float32, a constant; 0 where masked."""
    if batch.old_logprobs is None:
        return torch.zeros_like(batch.logprobs, dtype=torch.float32)
    return (batch.logprobs.detach().float() - batch.old_logprobs).masked_fill_(~batch.mask, 0.0)


def outside(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where the lower and the upper bound of the ratio take the gradient."""
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def _one_each(trainer: Any, batch: Batch) -> bool:
    """Whether a sequence has one ratio and one advantage, and so is clipped or is not."""
    return trainer.importance_sampling_level == "sequence" and batch.advantages.shape[1] == 1


def _clipped(trainer: Any, batch: Batch) -> list[Tensor]:
    """Of each sequence, how often a bound could be active, and how often the lower and the upper
    one are, (B,) each: once a token, or once where the sequence has one ratio and one advantage.
    Nothing where the ratio is 1, which is between all bounds.
    """
    if batch.old_logprobs is None:
        return []
    by_sequence = trainer.importance_sampling_level == "sequence"
    tokens = batch.mask.sum(-1)
    if by_sequence:
        ratio = log_ratio(batch).sum(-1, keepdim=True) / tokens[:, None].clamp(min=1)
    else:
        ratio = batch.logprobs.detach().float() - batch.old_logprobs
    low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high
    if trainer.loss_type == "cispo":
        low, high = -math.inf, trainer.epsilon_high
    beyond = outside(ratio.exp_(), batch.advantages, low, high)
    if _one_each(trainer, batch):
        return [torch.ones_like(tokens), *(x[:, 0] for x in beyond)]
    return [tokens, *((x & batch.mask).sum(-1) for x in beyond)]


def _of_phi(batch: Batch, phi: Tensor) -> list[Tensor]:
    """Of each sequence, the number of VESPO's weights and their sum, (B,) each."""
    if phi.shape[1] == 1:
        return [torch.ones_like(phi[:, 0]), phi[:, 0]]
    return [batch.mask.sum(-1), torch.where(batch.mask, phi, 0.0).sum(-1)]


def log(trainer: Any, batch: Batch, metrics: Tensor, phi: Tensor | None) -> None:
    """Means over the tokens of all processes, or over their sequences where TRL has one value a
    sequence; read from the device once.
    """
    loss_type, found = trainer.loss_type, trainer._metrics[batch.mode]
    columns = []
    if phi is not None:
        columns = _of_phi(batch, phi)
    elif loss_type != "sapo":
        columns = _clipped(trainer, batch)
    rows = trainer.accelerator.gather(torch.cat([metrics, *columns])[None]).tolist()
    kl, entropy, tokens = (
        sum(row[METRICS.index(name)] for row in rows) for name in ("kl", "entropy", "tokens")
    )
    if trainer.beta != 0.0:
        found["kl"].append(kl / max(tokens, 1.0))
    found["entropy"].append(entropy / max(tokens, 1.0))
    if loss_type == "sapo":
        return
    once = 1.0 if _one_each(trainer, batch) else tokens
    counts, *values = _columns(rows, len(columns)) or ([once], [0.0], [0.0])
    total = max(sum(counts), 1.0)
    if loss_type == "vespo":
        found["vespo/phi_seq_mean"].append(sum(values[0]) / total)
    elif loss_type == "cispo":
        found["cispo_clip_ratio"].append(sum(values[1]) / total)
    else:
        log_clipped(found, counts, *values)


def _columns(rows: list[list[float]], number: int) -> list[list[float]]:
    """The columns behind the metrics, each of the sequences of all processes."""
    if number == 0:
        return []
    size = (len(rows[0]) - len(METRICS)) // number
    starts = (len(METRICS) + i * size for i in range(number))
    return [[x for row in rows for x in row[start : start + size]] for start in starts]


def log_clipped(
    found: dict[str, list[float]], counts: list[float], low: list[float], high: list[float]
) -> None:
    """TRL's shares of clipped tokens. The extremes are over sequences that have tokens."""
    total = max(sum(counts), 1.0)
    found["clip_ratio/low_mean"].append(sum(low) / total)
    found["clip_ratio/high_mean"].append(sum(high) / total)
    found["clip_ratio/region_mean"].append((sum(low) + sum(high)) / total)
    lows = (x / count for x, count in zip(low, counts, strict=True) if count)
    highs = (x / count for x, count in zip(high, counts, strict=True) if count)
    found["clip_ratio/low_min"].append(min(lows, default=math.nan))
    found["clip_ratio/high_max"].append(max(highs, default=math.nan))
