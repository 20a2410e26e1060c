"""Tokens whose logprob and advantage are high together: what Clip-Cov and KL-Cov do to a few of
them, so that the policy keeps its entropy.

    Cov_i = (logp_i - mean logp) (A_i - mean A)                                         eq. 10
    Clip-Cov: floor(r N) tokens, drawn from those with Cov_i in [low, high], have no
              surrogate                                                                 eq. 11, 12
    KL-Cov:   the floor(k N) tokens of the largest Cov_i pay beta KL(old || policy)     eq. 13, 14

The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
https://arxiv.org/abs/2505.22617. The N tokens are those of an optimizer step, all its micro-batches
together, and logp is of the policy before it: what is chosen does not depend on how the rollouts
are split. At least one token is chosen, as in the authors' code, where there is one to choose. The
KL is estimated by |logp - old|, as in their listing 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.data.stream import random_keys
from warpo.engine.models.batch import Batch
from warpo.engine.models.score import score
from warpo.engine.ranks import ONE_RANK, Ranks


def by_covariance(
    row: Algorithm,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    temperature: float,
    seed: tuple[int, int, int],
    ranks: Ranks = ONE_RANK,
) -> tuple[list[Batch], Tensor | None]:
    """The micro-batches of an optimizer step with advantages of 0 where Clip-Cov takes the
    surrogate away, or with the tokens marked that pay KL-Cov's penalty.

    In the first optimizer step of a step the policy is the old one: old_logprobs are its logprobs,
    and the penalty and its gradient are 0, so no token is marked. In the others the policy scores
    the micro-batches.

    Args:
        seed: of the run, the step, and the number of the optimizer step in it, from 0.

    Returns:
        The micro-batches; (2,) float64: the mean of Cov_i, and the share of tokens chosen, or None
        where none was chosen from.
    """
    is_first = seed[-1] == 0
    if is_first and row.covariance == "kl":
        return list(batches), None
    logprobs = [
        _given(batch.old_logprobs) if is_first else score(model, batch, temperature)
        for batch in batches
    ]
    index = torch.cat([_given(batch.token_index) for batch in batches])
    advantages = torch.cat([_given(batch.advantages) for batch in batches])
    order = index.argsort(stable=True)
    mine = torch.stack([torch.cat(logprobs), advantages]).double()[:, order]
    parts = ranks.gather([mine])
    covariance = _covariances(torch.cat(parts, 1))
    chosen = choose(row, covariance, seed)
    start = sum(part.shape[1] for part in parts[: ranks.rank])
    own = torch.empty_like(index, dtype=torch.bool)
    own[order] = chosen[start : start + len(own)]
    masks = own.split([batch.num_trained for batch in batches])
    report = torch.stack([covariance.mean(), chosen.double().mean()])
    return [_changed(row, *pair) for pair in zip(batches, masks, strict=True)], report


def choose(row: Algorithm, covariance: Tensor, seed: tuple[int, int, int]) -> Tensor:
    """(N,) bool: the tokens that the row chooses, of these covariances, (N,)."""
    total = len(covariance)
    count = max(1, int(row.covariance_share * total))
    chosen = torch.zeros_like(covariance, dtype=torch.bool)
    if row.covariance == "kl":
        # of equal ones the first
        chosen[covariance.sort(descending=True, stable=True).indices[:count]] = True
        return chosen
    low, high = row.covariance_range
    allowed = (covariance >= low) & (covariance <= high)
    # non-negative, so that a token that is not allowed comes last
    drawn = (random_keys(np.arange(total, dtype=np.uint64), *seed) >> np.uint64(1)).view(np.int64)
    keys = torch.from_numpy(drawn).to(covariance.device).masked_fill(~allowed, 2**63 - 1)
    chosen[keys.topk(min(count, total), largest=False).indices] = True
    return chosen & allowed


def _covariances(both: Tensor) -> Tensor:
    """both: (2, N) float64, logprobs and advantages."""
    centred = both - both.mean(1, keepdim=True)
    return centred[0] * centred[1]


def _changed(row: Algorithm, batch: Batch, chosen: Tensor) -> Batch:
    if row.covariance == "kl":
        return replace(batch, penalized=chosen)
    return replace(batch, advantages=_given(batch.advantages).masked_fill(chosen, 0))


def _given(column: Tensor | None) -> Tensor:
    assert column is not None
    return column
