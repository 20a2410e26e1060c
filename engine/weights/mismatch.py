"""Distance between sampler and learner after a step, by cause.

All of it on the probe's sequences, `probe.num_sequences` rollouts from all over the step, once the
sampler has the weights wn that the step ends with. With logprobs of one token in nats:

    kernels      d = learner(wn) - sampler(wn): the same weights and tokens in other kernels, at
                 temperature 1, of every token after the first
    composition  d = learner(wn), the sequences packed together - learner(wn), only the first

    mean = mean |d|,   max = max |d|,   outside = share of tokens whose e^d is not in [0.9, 1.1]

What moves within the step is in learner/drift.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from warpo.engine.learner.agreement import Probed
from warpo.engine.learner.drift import mean_and_max
from warpo.engine.models.score import pack_scored, score
from warpo.engine.types import Metrics

# A ratio past these moves a gradient by a tenth.
RATIO_LOW, RATIO_HIGH = 0.9, 1.1


def kernels(probed: Probed) -> Metrics:
    """mismatch/kernels_{mean,max,outside} of the logprobs that the probe computed."""
    difference = probed.learner - probed.sampler
    ratio = difference.exp()
    outside = (ratio < RATIO_LOW) | (ratio > RATIO_HIGH)
    return mean_and_max("kernels", difference) | {
        "mismatch/kernels_outside": outside.float().mean().item()
    }


def composition(model: nn.Module, sequences: Sequence[Sequence[int]], probed: Probed) -> Metrics:
    """mismatch/composition_max, of the probe's first sequence: a forward pass of only that one."""
    alone = score(model, pack_scored(model, sequences[:1]), 1.0).cpu()
    packed = probed.learner[: len(alone)]
    return {"mismatch/composition_max": (packed - alone).abs().max().item()}
