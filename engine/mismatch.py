"""How far sampler and learner are apart in a step, by cause.

All of it on the probe's sequences, `probe.num_sequences` rollouts from all over the step. A step of
training samples with weights w0 and takes optimizer steps w0 -> w1 -> ... -> wn; then the sampler
gets wn and the probe scores. With logprobs of one token in nats:

    kernels      d = learner(wn) - sampler(wn): the same weights and tokens in other kernels, at
                 temperature 1, of every token after the first
    composition  d = learner(wn), the sequences packed together - learner(wn), the first one alone
    staleness    d = learner(w(n-1)) - learner(w0), at the sampling temperature, of the completions:
                 how old the samples are when the last optimizer step uses them
    sampling     d = recorded by the sampler while it drew - learner(w0), as above, and where that
                 is small, of a completion of every prompt too: what decides whether the sampler's
                 logprobs serve as old_logprobs
    truncation   the same d, where top_k or top_p are on: -log of the mass that they kept, and the
                 kernels' difference

    mean = mean |d|,   max = max |d|,   outside = share of tokens whose e^d is not in [0.9, 1.1]

but for truncation, whose mean is that of d itself: its sign is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from warpo.engine.batch import Batch, split_rows
from warpo.engine.probe import Probed
from warpo.engine.score import pack_scored, score
from warpo.engine.step_rollouts import StepRollouts
from warpo.engine.types import Metrics

# A ratio past these moves a gradient by a tenth.
RATIO_LOW, RATIO_HIGH = 0.9, 1.1


def kernels(probed: Probed) -> Metrics:
    """mismatch/kernels_{mean,max,outside} of the logprobs that the probe computed."""
    difference = probed.learner - probed.sampler
    ratio = difference.exp()
    outside = (ratio < RATIO_LOW) | (ratio > RATIO_HIGH)
    return _mean_and_max("kernels", difference) | {
        "mismatch/kernels_outside": outside.float().mean().item()
    }


def composition(model: nn.Module, sequences: Sequence[Sequence[int]], probed: Probed) -> Metrics:
    """mismatch/composition_max, of the probe's first sequence: a forward pass of it alone."""
    alone = score(model, pack_scored(model, sequences[:1]), 1.0).cpu()
    packed = probed.learner[: len(alone)]
    return {"mismatch/composition_max": (packed - alone).abs().max().item()}


class Drift:
    """Staleness and truncation of one training step: the logprobs of some of its rollouts, by the
    learner, before the first and before the last optimizer step.

    Made before the first one. With one optimizer step w(n-1) is w0, and nothing more is scored.

    Attributes:
        sampling_difference: max |recorded by the sampler - learner(w0)|; inf with no rollouts.
    """

    def __init__(self, model: nn.Module, rollouts: StepRollouts, temperature: float) -> None:
        self._model, self._temperature = model, temperature
        self._rollouts = rollouts
        self._batch = rollouts.batch(rollouts.probed) if rollouts.probed else None
        self._first = self._last = self._score()
        self.sampling_difference = float("inf")
        if self._batch is not None:
            self.sampling_difference = _largest(_sampled(self._batch) - self._first)

    def widen(self, rows: Sequence[int], token_budget: int) -> None:
        """Let further rollouts count in `sampling_difference`, in micro-batches."""
        for micro in split_rows(self._rollouts.sequences, rows, token_budget):
            batch = self._rollouts.batch(micro)
            found = _sampled(batch) - score(self._model, batch, self._temperature)
            self.sampling_difference = max(self.sampling_difference, _largest(found))

    def _score(self) -> Tensor:
        if self._batch is None:
            return torch.empty(0)
        return score(self._model, self._batch, self._temperature)

    def before_last_update(self) -> None:
        """To be called where there are several optimizer steps."""
        self._last = self._score()

    def metrics(self, *, truncated: bool) -> Metrics:
        """mismatch/sampling_max, mismatch/staleness_{mean,max} and mismatch/truncation_mean.

        Args:
            truncated: the rollouts were drawn with top_k or top_p; 0 is reported where not.
        """
        if self._batch is None:
            return {}
        truncation = (_sampled(self._batch) - self._first).mean().item()
        return {
            "mismatch/sampling_max": self.sampling_difference,
            "mismatch/truncation_mean": truncation if truncated else 0.0,
            **_mean_and_max("staleness", self._last - self._first),
        }


def _sampled(batch: Batch) -> Tensor:
    assert batch.sampler_logprobs is not None
    return batch.sampler_logprobs


def _largest(difference: Tensor) -> float:
    return difference.abs().nan_to_num(torch.inf).max().item()


def _mean_and_max(cause: str, difference: Tensor) -> Metrics:
    distance = difference.abs()
    return {
        f"mismatch/{cause}_mean": distance.mean().item(),
        f"mismatch/{cause}_max": distance.max().item(),
    }
