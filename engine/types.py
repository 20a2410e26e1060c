"""Types that travel through a step: prompts, completions, and the learner's sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Metrics = dict[str, float]
ReportProgress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""
TokenIds = Sequence[int] | np.ndarray
TokenSteps = list[tuple[int, float]]
"""(index of the last token of the step in its completion, score) of each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as the model reads it, and its row for the reward function.

    Attributes:
        prompt_id: the same for rows of one prompt, wherever they stand, and for no others.
    """

    token_ids: list[int]
    fields: dict[str, Any]
    prompt_id: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """A sampled completion: token ids as the sampler produced them, never re-tokenised.

    Attributes:
        token_ids: (n,) int64, the end-of-sequence token included where it was sampled.
        logprobs: (n,) float32, natural-log probability of each id at the sampling temperature.
        finished: True if the model ended the sequence, False if it was cut at the length limit.
        weight_version: version of the weights that sampled it: the step after which they were
            published.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: bool
    weight_version: int

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        *,
        finished: bool,
        weight_version: int,
    ) -> Completion:
        """From plain numbers."""
        return cls(
            token_ids=np.array(token_ids, np.int64),
            logprobs=np.array(logprobs, np.float32),
            finished=finished,
            weight_version=weight_version,
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Completion)
            and (self.finished, self.weight_version) == (other.finished, other.weight_version)
            and np.array_equal(self.token_ids, other.token_ids)
            and np.array_equal(self.logprobs, other.logprobs)
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSequence:
    """Tokens that the learner reads together, and those of them that it is trained on.

    Attributes:
        token_ids: (n,) int64.
        trained_spans: (start, stop) of runs of trained tokens, ascending and apart; the first
            start is at least 1, since a token is predicted by the one before it.
    """

    token_ids: np.ndarray
    trained_spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, prompt: TokenIds, completion: TokenIds) -> TokenSequence:
        """A prompt with one completion, which is trained on."""
        parts = [np.asarray(part, np.int64) for part in (prompt, completion)]
        return cls(
            token_ids=np.concatenate(parts),
            trained_spans=((len(prompt), len(prompt) + len(completion)),),
        )

    @classmethod
    def scored(cls, token_ids: Sequence[int]) -> TokenSequence:
        """A text of which every token but the first counts."""
        return cls.of(token_ids[:1], token_ids[1:])

    @property
    def sequences(self) -> tuple[TokenSequence]:
        """Itself, as what a micro-batch is made of."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return sum(stop - start for start, stop in self.trained_spans)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is trained on."""
        return self.trained_spans[0][0]
