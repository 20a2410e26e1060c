"""How far sampler and learner are apart in a step, by cause.

All of it on the probe's sequences, the first `probe.num_sequences` rollouts of the step. A training
step samples with weights w0 and takes optimizer steps w0 -> w1 -> ... -> wn; then the sampler gets
wn and the probe scores. With logprobs of one token in nats:

    kernels      d = learner(wn) - sampler(wn): the same weights and tokens in other kernels, at
                 temperature 1, of every token after the first
    composition  d = learner(wn), the sequences packed together - learner(wn), each alone
    staleness    d = learner(w(n-1)) - learner(w0), at the sampling temperature, of the completions:
                 how old the samples are when the last optimizer step uses them
    truncation   d = recorded by the sampler - learner(w0), as above: -log of the mass that top_k
                 and top_p kept, and the kernels' difference

    mean = mean |d|,   max = max |d|,   outside = share of tokens whose e^d is not in [0.9, 1.1]

but for truncation, whose mean is that of d itself: its sign is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from warpo.engine.batch import Rollout, pack
from warpo.engine.step import Probe, as_rollout, score

Metrics = dict[str, float]

# A ratio past these moves a gradient by a tenth.
RATIO_LOW, RATIO_HIGH = 0.9, 1.1


def kernels(probe: Probe) -> Metrics:
    """mismatch/kernels_{mean,max,outside} of the logprobs that the probe computed."""
    difference = probe.learner - probe.sampler
    ratio = difference.exp()
    outside = (ratio < RATIO_LOW) | (ratio > RATIO_HIGH)
    return _mean_and_max("kernels", difference) | {
        "mismatch/kernels_outside": outside.float().mean().item()
    }


def composition(model: nn.Module, sequences: Sequence[Sequence[int]], probe: Probe) -> Metrics:
    """mismatch/composition_max: a forward pass of each of the probe's sequences."""
    device = next(model.parameters()).device
    batches = [pack([as_rollout(ids, 1)]).to(device) for ids in sequences]
    alone = torch.cat([score(model, batch, 1.0) for batch in batches]).cpu()
    return {"mismatch/composition_max": (probe.learner - alone).abs().max().item()}


class Drift:
    """Staleness and truncation of one training step.

    `before_update` scores before the first and the last optimizer step. With one optimizer step
    w(n-1) is w0, and without truncation there is nothing to compare: what is 0 by definition costs
    no forward pass.

    Args:
        rollouts: those of the probe; with none, nothing is measured.
        temperature: that of sampling.
        updates: optimizer steps in the training step.
        truncated: the rollouts were drawn with top_k or top_p.
    """

    def __init__(
        self,
        model: nn.Module,
        rollouts: Sequence[Rollout],
        *,
        temperature: float,
        updates: int,
        truncated: bool,
    ) -> None:
        self._model, self._temperature, self._truncated = model, temperature, truncated
        self._batch = pack(rollouts).to(next(model.parameters()).device) if rollouts else None
        self._scored_before = {0, updates - 1} if updates > 1 else {0} if truncated else set()
        self._logprobs: list[Tensor] = []

    def before_update(self, update: int) -> None:
        """To be called before each optimizer step, counted from 0."""
        if self._batch is not None and update in self._scored_before:
            self._logprobs.append(score(self._model, self._batch, self._temperature))

    def metrics(self) -> Metrics:
        """mismatch/staleness_{mean,max} and mismatch/truncation_mean."""
        if self._batch is None:
            return {}
        found = {"mismatch/truncation_mean": 0.0}
        if self._truncated:
            difference = self._batch.sampler_logprobs - self._logprobs[0]
            found["mismatch/truncation_mean"] = difference.mean().item()
        if len(self._logprobs) < 2:
            return found | {"mismatch/staleness_mean": 0.0, "mismatch/staleness_max": 0.0}
        return found | _mean_and_max("staleness", self._logprobs[1] - self._logprobs[0])


def _mean_and_max(cause: str, difference: Tensor) -> Metrics:
    distance = difference.abs()
    return {
        f"mismatch/{cause}_mean": distance.mean().item(),
        f"mismatch/{cause}_max": distance.max().item(),
    }
