"""The rollouts of a step in columns: what sampling, scoring and estimation know of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warpo.engine.models.batch import Batch, pack, starts_of
from warpo.engine.types import Completion, Prompt, TokenSequence, TokenSteps

COLUMNS = (
    *("sampler_logprobs", "old_logprobs", "ref_logprobs"),
    *("values", "advantages", "returns", "right"),
)


@dataclass(kw_only=True, eq=False)
class StepRollouts:
    """B rollouts, whose M trained tokens stand one after the other in columns.

    Scoring and estimation fill columns with `fill`; a micro-batch is `batch` of some of the rows.

    Attributes:
        sequences: B prompts with a completion.
        group_ids: (B,) int64: rows of one number are compared with each other, and are neighbours.
        rewards: (B,) float64, of whole completions.
        step_rewards: step rewards of each completion, with process supervision; None without.
        source_rewards: (B, K) float64, unweighed, of each source with a weight other than 0, where
            the estimator asks for them.
        source_weights: (K,) float64.
        baseline_rewards: (B,) float64, of the greedy completion of the same prompt, where the
            estimator asks for it.
        sampler_logprobs: (M,) float32, as the sampler computed them.
        old_logprobs: (M,) float32, of the policy that the step began with; None: those of the
            sampler serve.
        ref_logprobs, values, advantages, returns: (M,) float32, where there is such a model or
            estimate.
        finished: (B,) bool, False for a completion that was cut at the length limit; None: all are.
        last_values: (B,) float32, of the state after a completion that was cut, and 0 after one
            that ended; None: 0.
        right: (M,) bool, tokens of completions that count as right, where a loss reads it.
        probed: rows that sampler and learner are compared on.
        labelled: pairs that the reward model learns from, where one does.
    """

    sequences: list[TokenSequence]
    group_ids: np.ndarray
    rewards: Tensor
    step_rewards: list[TokenSteps] | None = None
    source_rewards: Tensor | None = None
    source_weights: Tensor | None = None
    baseline_rewards: Tensor | None = None
    sampler_logprobs: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    finished: Tensor | None = None
    last_values: Tensor | None = None
    right: Tensor | None = None
    probed: Sequence[int] = ()
    labelled: Sequence[Any] = ()

    def __post_init__(self) -> None:
        self._starts = starts_of(self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def device(self) -> torch.device:
        return self.sampler_logprobs.device

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64, trained tokens of each."""
        return np.diff(self._starts)

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32, where the tokens of each start, on the device of the columns."""
        return torch.from_numpy(self._starts).to(self.device, torch.int32)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all prompts and completions."""
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def group_size(self) -> int:
        """Rows of a group, the same for all."""
        _, counts = np.unique(self.group_ids, return_counts=True)
        assert (counts == counts[0]).all(), "groups differ in size"
        return int(counts[0])

    @property
    def probed_tokens(self) -> list[list[int]]:
        """Token ids of the probed sequences."""
        return [self.sequences[row].token_ids.tolist() for row in self.probed]

    def tokens_of(self, rows: Sequence[int]) -> Tensor:
        """(m,) int64: places in the columns of the tokens of some rows, row by row."""
        spans = [np.arange(self._starts[row], self._starts[row + 1]) for row in rows]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *spans])).to(self.device)

    def batch(self, rows: Sequence[int]) -> Batch:
        """One micro-batch of some rows, on the device of the columns."""
        tokens = self.tokens_of(rows)
        columns: dict[str, Any] = {
            name: column[tokens] for name in COLUMNS if (column := getattr(self, name)) is not None
        }
        columns.setdefault("old_logprobs", columns["sampler_logprobs"])
        packed = pack([self.sequences[row] for row in rows]).to(self.device)
        return replace(packed, token_index=tokens, **columns)

    def fill(self, name: str, rows: Sequence[int], values: Tensor) -> None:
        """Write the tokens of some rows into a column, which is made where there is none."""
        self.fill_tokens(name, self.tokens_of(rows), values)

    def fill_tokens(self, name: str, tokens: Tensor, values: Tensor) -> None:
        """Likewise, by the places (m,) of the tokens in the columns."""
        if getattr(self, name) is None:
            setattr(self, name, torch.full_like(self.sampler_logprobs, torch.nan))
        getattr(self, name)[tokens] = values

    def fill_last_values(self, rows: Sequence[int], values: Tensor) -> None:
        """Write the values of the states after some rows, of which those that were cut count."""
        if self.last_values is None:
            self.last_values = torch.zeros(len(self), device=self.device)
        if self.finished is not None:
            values = values.masked_fill(self.finished[rows].to(values.device), 0.0)
            self.last_values[rows] = values

    def mark_right(self, success: float) -> None:
        """Fill the column of the tokens of completions with at least this reward."""
        right = torch.repeat_interleave(self.rewards >= success, torch.from_numpy(self.lengths))
        self.right = right.to(self.device)

    def to(self, device: torch.device | str) -> StepRollouts:
        """The same rollouts with their columns on a device."""
        moved: dict[str, Any] = {
            name: column.to(device)
            for name in COLUMNS
            if (column := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def step_rollouts(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], rewards: Sequence[float]
) -> StepRollouts:
    """Rollouts of prompts and the completions of each, with the rewards of all in their order."""
    pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    logprobs = [completion.logprobs for _, completion in pairs]
    return StepRollouts(
        sequences=[
            TokenSequence.of(prompt.token_ids, completion.token_ids) for prompt, completion in pairs
        ],
        group_ids=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        finished=torch.tensor([completion.finished for _, completion in pairs]),
        sampler_logprobs=torch.from_numpy(np.concatenate(logprobs)),
    )


def spread(count: int, number: int) -> list[int]:
    """`number` of `count` rows, at equal distances."""
    number = min(number, count)
    return [i * count // number for i in range(number)]
