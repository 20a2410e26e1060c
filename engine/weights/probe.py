"""Proof that the sampler computes with the learner's weights: both score the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from warpo.engine.learner.agreement import Probed, check_agreement, check_finite
from warpo.engine.models.score import pack_scored, score
from warpo.engine.rollout.sampler.base import Sampler
from warpo.engine.types import TokenSequence


def probe_weights(
    model: nn.Module,
    sampler: Sampler,
    sequences: Sequence[Sequence[int]],
    tolerance: float,
    decode: Callable[[list[int]], Any] | None = None,
) -> Probed:
    """Let both score the same sequences.

    Args:
        sequences: token ids, two or more each.
        tolerance: largest |learner - sampler| / max(1, |logprob|) that is taken for rounding; of
            its mean MEAN_SHARE times as much.
        decode: the text of token ids, for the error.

    Returns:
        The logprobs of both at temperature 1, of every token but the first of each.

    Raises:
        TrainingError: the model's weights, or the learner's logprobs, are not finite.
        WeightMismatch: a difference is above the tolerance, or the sampler's logprobs are not
            finite.
    """
    learner = score(model, pack_scored(model, sequences), 1.0).cpu()
    check_finite(model, learner)
    sampled = torch.tensor([logp for row in sampler.score(sequences) for logp in row])
    probed = Probed(learner, sampled)
    scored = [TokenSequence.scored(ids) for ids in sequences]
    version = sampler.weight_version
    check_agreement(probed, scored, tolerance, version=version, decode=decode)
    return probed
