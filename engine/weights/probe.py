"""Proof that the sampler computes with the learner's weights: both score the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.models.score import pack_scored, score
from warpo.engine.rollout.sampler.base import Sampler
from warpo.engine.run.checkpoint import first_not_finite

# Rounding scatters around 0, other weights move every token: the mean may be this share of the
# largest difference.
MEAN_SHARE = 0.1


class Probed(NamedTuple):
    """Logprobs of learner and sampler for the same tokens: (M,) float32 at temperature 1, on
    the host, of every token of the sequences but their first.
    """

    learner: Tensor
    sampler: Tensor


def relative(difference: Tensor, logprobs: Tensor) -> Tensor:
    """|difference| / max(1, |logprob|): what is rounded is the logits, which are large where a
    logprob is."""
    return difference.abs() / logprobs.abs().clamp(min=1)


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
        The logprobs of both.

    Raises:
        TrainingError: the model's weights, or the learner's logprobs, are not finite.
        WeightMismatch: a difference is above the tolerance, or the sampler's logprobs are not
            finite.
    """
    learner = score(model, pack_scored(model, sequences), 1.0).cpu()
    _check_finite(model, learner)
    sampled = torch.tensor([logp for row in sampler.score(sequences) for logp in row])
    probed = Probed(learner, sampled)
    errors = relative(learner - sampled, learner).nan_to_num(torch.inf)
    if not (errors.max() <= tolerance and errors.mean() <= MEAN_SHARE * tolerance):
        raise WeightMismatch(_describe(probed, errors, sequences, tolerance, sampler, decode))
    return probed


def _check_finite(model: nn.Module, logprobs: Tensor) -> None:
    if torch.isfinite(logprobs).all():
        return
    name = first_not_finite(model.named_parameters())
    if name is not None:
        raise TrainingError(
            f"the model's weights are not finite: {name} holds NaN or infinity. Lower update.lr, "
            "and resume from a checkpoint before it, or check the model's own files"
        )
    raise TrainingError(
        "the model's logprobs are not finite, though its weights are: its activations overflow. "
        "Lower update.lr, and resume from a checkpoint before it"
    )


def _describe(
    probed: Probed,
    errors: Tensor,
    sequences: Sequence[Sequence[int]],
    tolerance: float,
    sampler: Sampler,
    decode: Callable[[list[int]], Any] | None,
) -> str:
    worst = int(errors.argmax())
    number, position = _place(worst, sequences)
    token = sequences[number][position]
    text = f" {decode([token])!r}" if decode else ""
    off = int((errors > tolerance).sum())
    return (
        f"the sampler does not compute what the learner does (version {sampler.weight_version} of "
        f"the weights): {off} of {len(errors)} tokens ({off / len(errors):.1%}) are further apart "
        f"than probe.tolerance = {tolerance:g}, relative to logprobs beyond 1, and their mean is "
        f"{errors.mean():.2g}, where {MEAN_SHARE * tolerance:.2g} is allowed. The worst is token "
        f"{token}{text} at position {position} of probed sequence {number}: logprob "
        f"{probed.learner[worst]:.4f} by the learner, {probed.sampler[worst]:.4f} by the sampler. "
        "Either publishing failed, or the sampler computes another function: sampler: transformers "
        "shows which. Where it is only rounding (few tokens, a narrow dtype), set probe.tolerance "
        f"above {max(errors.max().item(), errors.mean().item() / MEAN_SHARE):.2g}, or lm_head_dtype"
        ": float32"
    )


def _place(token: int, sequences: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Sequence and position of the scored token of that number."""
    for number, sequence in enumerate(sequences):
        if token < len(sequence) - 1:
            return number, token + 1
        token -= len(sequence) - 1
    raise IndexError(token)
