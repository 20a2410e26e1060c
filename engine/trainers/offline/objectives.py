"""Objectives of the rows: how each packs its examples into micro-batches, and reads its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from warpo.engine.config.offline import LOSS_KEYS, OfflineConfig, given, resolve_preference
from warpo.engine.data.examples import Example
from warpo.engine.learner import losses
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.micro_batches import split_rows
from warpo.engine.ranks import Ranks
from warpo.kernels import ops
from warpo.kernels.preferences import PREFERENCES


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Packed examples, with what the data says of them.

    Attributes:
        batch: the sequences; of pairs the chosen ones, then the rejected ones.
        values: the numbers of the examples, one after the other, float32.
        groups: (G + 1,) int32, where among the sequences those of each example start.
        ends: (K,) int64, index among the tokens of the last one of each step.
        unrelated: the prompts with the completions of others, for KTO.
    """

    batch: Batch
    values: Tensor
    groups: Tensor
    ends: Tensor
    unrelated: Batch | None = None

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineObjective:
    """The loss of an algorithm, and what the loop needs to know of it.

    Attributes:
        gradients: adds the gradient of an optimizer step; returns a vector of metrics.
        read: returns the vector as {"loss", "accuracy", "margin"}, as far as it has them.
        reference: whether examples need logprobs of the model that training starts from.
        scalar: whether the model has one number per token instead of logits.
        normalise: whether the mean of these numbers is free, and made 0 at the end.
    """

    gradients: Callable[[PreTrainedModel, Sequence[MicroBatch], Ranks], Tensor]
    read: Callable[[Tensor], dict[str, float]]
    reference: bool = False
    scalar: bool = False
    normalise: bool = False


def make_objective(config: OfflineConfig) -> OfflineObjective:
    """The objective of `config.algorithm`, with the numbers of `config.loss`."""
    name, options = config.algorithm, given(config.loss, LOSS_KEYS[config.algorithm])
    if name in PREFERENCES:
        preference = resolve_preference(config)
        return OfflineObjective(
            gradients=lambda model, micro, ranks: losses.preference_gradients(
                model, [m.batch for m in micro], preference, ranks=ranks
            ),
            read=lambda vector: _short(ops.preference_metrics(vector), "preference"),
            reference=preference.reference,
        )
    if name == "kto":
        return OfflineObjective(
            gradients=lambda model, micro, ranks: losses.kto_gradients(
                model,
                [m.batch for m in micro],
                [m.unrelated for m in micro if m.unrelated],
                [m.values.bool() for m in micro],
                ranks=ranks,
                **options,
            ),
            read=lambda vector: _short(ops.kto_metrics(vector), "kto"),
            reference=True,
        )
    if name == "bradley_terry":
        return OfflineObjective(
            gradients=lambda model, micro, ranks: losses.pair_gradients(
                model, [m.batch for m in micro], [m.values for m in micro], ranks=ranks, **options
            ),
            read=lambda vector: _short(ops.reward_model_metrics(vector), "reward_model"),
            scalar=True,
            normalise=True,
        )
    if name == "k_wise":
        return OfflineObjective(
            gradients=lambda model, micro, ranks: losses.ranking_gradients(
                model, [m.batch for m in micro], [m.groups for m in micro], ranks=ranks, **options
            ),
            read=lambda vector: _short(ops.reward_model_metrics(vector), "reward_model"),
            scalar=True,
            normalise=True,
        )
    if name == "process_reward":
        return OfflineObjective(
            gradients=lambda model, micro, ranks: losses.step_gradients(
                model,
                [m.batch for m in micro],
                [m.ends for m in micro],
                [m.values for m in micro],
                ranks=ranks,
            ),
            read=_read_steps,
            scalar=True,
        )
    return OfflineObjective(
        gradients=lambda model, micro, ranks: losses.supervised_gradients(
            model, [m.batch for m in micro], ranks=ranks
        ),
        read=lambda vector: {"loss": vector.item()},
    )


def micro_batches(
    examples: Sequence[Example], algorithm: str, token_budget: int, *, shared: bool = True
) -> list[MicroBatch]:
    """The examples, packed by a token budget; those of one prompt, and of one length, together."""
    parts = split_rows(examples, token_budget, shared=shared)
    return [_pack([examples[row] for row in part], algorithm) for part in parts]


def _pack(examples: Sequence[Example], algorithm: str) -> MicroBatch:
    places = every_completion(examples)
    unrelated = None
    if algorithm in PREFERENCES or algorithm == "bradley_terry":
        places.sort(key=lambda place: place[1])
    elif algorithm == "kto":
        unrelated = pack_sequences([(example, 1) for example in examples])
        places = [(example, 0) for example in examples]
    batch = pack_sequences(places)
    ends = [
        int(batch.gather_index[row, len(example.prompt_ids) + end])
        for row, (example, _) in enumerate(places)
        for end in example.ends
    ]
    sizes = [len(example.completions) for example in examples]
    return MicroBatch(
        batch=batch,
        values=torch.tensor([value for example in examples for value in example.values]),
        groups=torch.tensor([0, *accumulate(sizes)], dtype=torch.int32),
        ends=torch.tensor(ends, dtype=torch.int64),
        unrelated=unrelated,
    )


def every_completion(examples: Sequence[Example]) -> list[tuple[Example, int]]:
    """Each completion by its example and its number there, example by example."""
    return [(example, i) for example in examples for i in range(len(example.completions))]


def pack_sequences(places: Sequence[tuple[Example, int]]) -> Batch:
    """One packed batch of completions, each given by its example and its number there."""
    batch = pack([example.sequence(i) for example, i in places])
    if not places[0][0].ref_logprobs:
        return batch
    return replace(
        batch, ref_logprobs=torch.cat([example.ref_logprobs[i] for example, i in places])
    )


def _short(metrics: dict[str, float], name: str) -> dict[str, float]:
    """The metrics of an operation under the names that all rows share, where they have them."""
    names = {f"loss/{name}": "loss", f"{name}/accuracy": "accuracy"}
    names |= {f"{name}/margin": "margin", "reward/margin": "margin"}
    return {names.get(metric, metric): value for metric, value in metrics.items()}


def _read_steps(vector: Tensor) -> dict[str, float]:
    row = dict(zip(losses.STEP_METRICS, vector.tolist(), strict=True))
    right = row["right_score"] / max(row["right"], 1.0)
    wrong = row["wrong_score"] / max(row["wrong"], 1.0)
    both = row["right"] > 0 and row["wrong"] > 0
    return {
        "loss": row["loss"],
        "accuracy": row["correct"] / max(row["steps"], 1.0),
        "margin": right - wrong if both else 0.0,
        "score/right": right,
        "score/wrong": wrong,
    }
