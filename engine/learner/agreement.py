"""Agreement of sampler and learner on the logprobs of the same tokens, which proves that they
compute with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.run.checkpoint import first_not_finite
from warpo.engine.types import TokenSequence

# Rounding scatters around 0, other weights move every token: the mean may be this share of the
# largest difference.
MEAN_SHARE = 0.1


class Probed(NamedTuple):
    """Logprobs of learner and sampler for the same tokens, the trained ones of some sequences: (M,)
    float32 on the host.
    """

    learner: Tensor
    sampler: Tensor


def relative(difference: Tensor, logprobs: Tensor) -> Tensor:
    """|difference| / max(1, |logprob|): what is rounded is the logits, which are large where a
    logprob is."""
    return difference.abs() / logprobs.abs().clamp(min=1)


def check_agreement(
    probed: Probed,
    sequences: Sequence[TokenSequence],
    tolerance: float,
    *,
    version: int,
    decode: Callable[[list[int]], Any] | None = None,
) -> None:
    """Refuse logprobs that differ by more than rounding.

    Args:
        sequences: those whose trained tokens were compared.
        tolerance: largest |learner - sampler| / max(1, |logprob|) that is taken for rounding; of
            its mean MEAN_SHARE times as much.
        version: of the weights, for the error.
        decode: the text of token ids, for the error.

    Raises:
        WeightMismatch: a difference is above the tolerance, or a logprob is not finite.
    """
    errors = relative(probed.learner - probed.sampler, probed.learner).nan_to_num(torch.inf)
    if errors.max() <= tolerance and errors.mean() <= MEAN_SHARE * tolerance:
        return
    worst = int(errors.argmax())
    number, position = _place(worst, sequences)
    token = int(sequences[number].token_ids[position])
    text = f" {decode([token])!r}" if decode else ""
    off = int((errors > tolerance).sum())
    raise WeightMismatch(
        f"the sampler does not compute what the learner does (version {version} of "
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


def check_finite(model: nn.Module, logprobs: Tensor) -> None:
    """Refuse logprobs of the learner that are not finite.

    Raises:
        TrainingError: it names the weights where they are at fault.
    """
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


def _place(token: int, sequences: Sequence[TokenSequence]) -> tuple[int, int]:
    """Sequence and position of the trained token of that number."""
    for number, sequence in enumerate(sequences):
        for start, stop in sequence.trained_spans:
            if token < stop - start:
                return number, start + token
            token -= stop - start
    raise IndexError(token)
