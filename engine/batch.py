"""What travels through a step: rollouts from the sampler, packed micro-batches to the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer: token ids as the sampler produced them, never re-tokenised.

    Attributes:
        token_ids: sampled ids, the end-of-sequence token included where it was sampled.
        logprobs: natural-log probability of each id at the sampling temperature.
        finished: True if the model ended the sequence, False if it was cut at the length limit.
        weight_version: of the weights that sampled it: the step that they were published after.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    weight_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt, one completion of it and what the step learned about that completion.

    Tensors have one float32 for each of the n tokens of the completion, and lie where the learner
    is.

    Attributes:
        reward: of the whole completion.
        step_rewards: (index of the last token of the step, reward) of each step of the completion;
            None without process supervision.
        baseline_reward: of the greedy completion of the same prompt, where the estimator asks it.
        old_logprobs: of the policy that the step began with; None: those of the sampler serve.
        ref_logprobs: of the reference.
        values: of the critic, for the state before each token.
        advantages: what the policy loss weighs each token with.
        returns: what the values should have been.
    """

    prompt_ids: list[int]
    completion: Completion
    reward: float = 0.0
    step_rewards: list[tuple[int, float]] | None = None
    baseline_reward: float = 0.0
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion.token_ids)


SCORES = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
"""The tensors of a rollout."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """One packed micro-batch: N tokens of B sequences in one row, M of them completion tokens.

    Sequences with the same prompt share its tokens: the row holds each prompt once. A causal model
    gives a prompt the same hidden states whatever follows it.

    Attributes:
        input_ids: (1, N) int64, each completion somewhere behind its prompt.
        position_ids: (1, N) int64, place of each token in its sequence.
        slots: (B, T) int64, index among the N of each token of each sequence, T the longest one;
            a shorter one ends in repetitions of its last token.
        places: (N,) int64, where in `slots`, flattened, each token is found.
        predictors: (M,) int64, index of the token whose logits predict each completion token.
        targets: (M,) int64, the completion tokens.
        completion_cu_seqlens: (B + 1,) int32, where each completion starts among the M tokens.
        sampler_logprobs: (M,) float32, as the sampler computed them.
        old_logprobs: (M,) float32, the sampler's or the learner's.
        ref_logprobs, values, advantages, returns: (M,) float32, None where no rollout has them.
    """

    input_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    places: Tensor
    predictors: Tensor
    targets: Tensor
    completion_cu_seqlens: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.completion_cu_seqlens.numel() - 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        tensors: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def pack(rollouts: Sequence[Rollout]) -> Batch:
    """One micro-batch of these rollouts, without padding and each prompt once."""
    longest = max(rollout.num_tokens for rollout in rollouts)
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    slots: list[list[int]] = []
    predictors: list[int] = []
    prompt_starts: dict[tuple[int, ...], int] = {}

    def append(tokens: Sequence[int], position: int) -> range:
        first, place = len(ids), (len(slots) * longest) + position
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        places.extend(range(place, place + len(tokens)))
        return range(first, len(ids))

    for rollout in rollouts:
        prompt = tuple(rollout.prompt_ids)
        if prompt not in prompt_starts:
            prompt_starts[prompt] = append(prompt, 0).start
        start = prompt_starts[prompt]
        taken = append(rollout.completion.token_ids, len(prompt))
        sequence = [*range(start, start + len(prompt)), *taken]
        predictors += sequence[len(prompt) - 1 : -1]
        slots.append(sequence + sequence[-1:] * (longest - len(sequence)))
    completions = [rollout.completion for rollout in rollouts]
    sampler_logprobs = torch.tensor([logp for c in completions for logp in c.logprobs])
    scores = {name: join(rollouts, name) for name in SCORES}
    old_logprobs = scores.pop("old_logprobs")
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        slots=torch.tensor(slots),
        places=torch.tensor(places),
        predictors=torch.tensor(predictors),
        targets=torch.tensor([token for c in completions for token in c.token_ids]),
        completion_cu_seqlens=_starts([len(c.token_ids) for c in completions]),
        sampler_logprobs=sampler_logprobs,
        old_logprobs=sampler_logprobs if old_logprobs is None else old_logprobs,
        **scores,
    )


def join(rollouts: Sequence[Rollout], name: str) -> Tensor | None:
    """(M,): a tensor of the rollouts, one after the other; None where they have none."""
    parts = [getattr(rollout, name) for rollout in rollouts]
    return None if parts[0] is None else torch.cat(parts)


def split(tokens: Tensor, rollouts: Sequence[Rollout]) -> tuple[Tensor, ...]:
    """(M,) of the completion tokens of rollouts, in parts for each of them."""
    return tokens.split([len(rollout.completion.token_ids) for rollout in rollouts])


class HasLength(Protocol):
    """A rollout, or an example with all its completions."""

    @property
    def num_tokens(self) -> int: ...


T = TypeVar("T", bound=HasLength)


def split_by_tokens(rollouts: Sequence[T], token_budget: int) -> list[list[T]]:
    """Micro-batches of at most `token_budget` tokens each, in the given order.

    Raises:
        ValueError: one rollout alone exceeds the budget.
    """
    micro_batches: list[list[T]] = []
    room = 0
    for rollout in rollouts:
        if rollout.num_tokens > token_budget:
            raise ValueError(
                f"a rollout of {rollout.num_tokens} tokens does not fit a micro-batch of "
                f"{token_budget}: raise update.token_budget or lower rollout.max_new_tokens"
            )
        if rollout.num_tokens > room:
            micro_batches.append([])
            room = token_budget
        micro_batches[-1].append(rollout)
        room -= rollout.num_tokens
    return micro_batches
