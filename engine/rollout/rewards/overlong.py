"""DAPO's soft punishment of long completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from warpo.engine.errors import ConfigError
from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.scores import Scored

if TYPE_CHECKING:
    from warpo.engine.types import Completion, Prompt


class OverlongPenalty:
    """`overlong_penalty` of each completion.

    Args:
        target: N of overlong:N, the tokens over which the penalty grows.

    Raises:
        ConfigError: it would begin before the first token.
    """

    def __init__(self, target: str, context: SourceContext) -> None:
        self._cache, self._max_new_tokens = int(target), context.max_new_tokens
        if self._cache > self._max_new_tokens:
            raise ConfigError(
                f"reward.sources: overlong:{target}: the penalty would begin before the first "
                f"token: at most rollout.max_new_tokens = {self._max_new_tokens}"
            )

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """By the tokens of each completion."""
        lengths = [len(completion) for completion in completions]
        limits = {"max_new_tokens": self._max_new_tokens, "cache": self._cache}
        return Scored(scores=[overlong_penalty(length, **limits) for length in lengths])

    def close(self) -> None:
        """Nothing is open."""


def overlong_penalty(length: int, *, max_new_tokens: int, cache: int) -> float:
    """0 up to L = max_new_tokens - cache tokens, then (L - length) / cache, which is -1 at
    max_new_tokens.

    Args:
        length: tokens of the completion.
        cache: tokens over which the penalty grows.

    Source: DAPO, https://arxiv.org/abs/2503.14476 equation 13.
    """
    return min(0.0, max(-1.0, (max_new_tokens - cache - length) / cache))
