"""Distance of the learner from what was sampled within a step, by cause.

With logprobs of a token in nats, over the probed rollouts of a step that begins with weights w0 and
takes optimizer steps w0 -> w1 -> ... -> wn:

    staleness    d = learner(w(n-1)) - learner(w0), at the sampling temperature, of the completions:
                 how old the samples are when the last optimizer step uses them
    sampling     d = recorded by the sampler while it drew - learner(w0), as above: beyond rounding
                 the sampler has not drawn with w0, and the step is refused. Where it is small, of a
                 completion of every prompt too: what decides whether the sampler's logprobs serve
                 as old_logprobs. Of all rollouts where a step's only update scores them
    truncation   the same d, where top_k or top_p are on: -log of the mass that they kept, and the
                 kernels' difference

    mean = mean |d|,   max = max |d|

but for truncation, whose mean is that of d itself: its sign is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warpo.engine.config.policy import Config
from warpo.engine.learner.agreement import Probed, check_agreement, check_finite
from warpo.engine.learner.minibatches import one_of_each_group
from warpo.engine.models.batch import Batch
from warpo.engine.models.micro_batches import split_rows
from warpo.engine.models.score import score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.types import Metrics
from warpo.kernels import ops


def mean_and_max(cause: str, difference: Tensor) -> Metrics:
    """mismatch/<cause>_mean and mismatch/<cause>_max of a difference."""
    distance = difference.abs()
    return {
        f"mismatch/{cause}_mean": distance.mean().item(),
        f"mismatch/{cause}_max": distance.max().item(),
    }


class Drift:
    """Staleness and truncation of one training step: the logprobs of some of its rollouts, by the
    learner, before the first and before the last optimizer step.

    Made before the first one. With one optimizer step w(n-1) is w0, and nothing more is scored.

    Args:
        scored: False where the first optimizer step's forward pass scores them, see `scored_by`.

    Attributes:
        scored: whether they have been.
        sampling_difference: max |recorded by the sampler - learner(w0)|; inf with no rollouts.
    """

    def __init__(
        self, model: nn.Module, rollouts: StepRollouts, temperature: float, *, scored: bool = True
    ) -> None:
        self._model, self._temperature = model, temperature
        self._rollouts = rollouts
        self._batch = rollouts.batch(rollouts.probed) if rollouts.probed else None
        self.sampling_difference = float("inf")
        self.scored = scored
        if scored:
            self._begin_with(self._score())

    def _begin_with(self, logprobs: Tensor) -> None:
        """Those of the probed rollouts by w0."""
        self._first = self._last = logprobs
        if self._batch is not None:
            self.sampling_difference = _largest(_sampled(self._batch) - logprobs)

    def scored_by(self, logprobs: Tensor) -> None:
        """Take the logprobs (M,) of all rollouts that the first optimizer step computed with w0."""
        self._begin_with(logprobs[self._rollouts.tokens_of(self._rollouts.probed)])
        self.sampling_difference = _largest(self._rollouts.sampler_logprobs - logprobs)
        self.scored = True

    def check(
        self, tolerance: float, *, version: int, decode: Callable[[list[int]], Any] | None = None
    ) -> None:
        """Prove that the sampler drew the rollouts, whose every token could be drawn, with w0.

        Args:
            tolerance: at temperature 1, as of `check_agreement`.

        Raises:
            TrainingError: the learner's logprobs are not finite.
            WeightMismatch: the sampler's differ by more than rounding.
        """
        if self._batch is None:
            return
        check_finite(self._model, self._first)
        check_agreement(
            Probed(self._first.cpu(), _sampled(self._batch).cpu()),
            [self._rollouts.sequences[row] for row in self._rollouts.probed],
            # rounding of logits is divided by the temperature as they are
            tolerance / min(1.0, self._temperature),
            version=version,
            decode=decode,
        )

    def widen(self, rows: Sequence[int], token_budget: int) -> None:
        """Let further rollouts count in `sampling_difference`, in micro-batches."""
        for micro in split_rows(self._rollouts.sequences, token_budget, rows):
            batch = self._rollouts.batch(micro)
            found = _sampled(batch) - score(self._model, batch, self._temperature)
            self.sampling_difference = max(self.sampling_difference, _largest(found))

    def _score(self) -> Tensor:
        if self._batch is None:
            return torch.empty(0)
        return score(self._model, self._batch, self._temperature)

    def before_last_update(self) -> None:
        """To be called before an optimizer step that may be the last, but the first."""
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
            **mean_and_max("staleness", self._last - self._first),
        }


def step_kl(
    model: nn.Module, rollouts: StepRollouts, config: Config, ranks: Ranks = ONE_RANK
) -> float:
    """d = E[KL(policy that the step began with, policy)], nats per token, of
    https://arxiv.org/abs/1707.06347 section 4: the mean of k3, r - 1 - log r with r = new / old
    probability, over the tokens of one completion of each prompt.

    Unbiased, as the old policy drew the tokens. Costs a forward pass over 1 / group_size of the
    rollouts.
    """
    # the last is the longest of all
    rows = one_of_each_group(rollouts)[:-1]
    total, count = torch.zeros((), device=rollouts.device), 0
    for micro in split_rows(rollouts.sequences, config.update.token_budget, rows):
        batch = rollouts.batch(micro)
        assert batch.old_logprobs is not None
        new = score(model, batch, config.rollout.temperature)
        total += ops.approx_kl(batch.old_logprobs, new, "k3").sum()
        count += new.numel()
    return (ranks.sum(total) / ranks.sum(count)).item()


def _sampled(batch: Batch) -> Tensor:
    assert batch.sampler_logprobs is not None
    return batch.sampler_logprobs


def _largest(difference: Tensor) -> float:
    return difference.abs().nan_to_num(torch.inf).max().item()
