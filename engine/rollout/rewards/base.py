"""Protocol of a reward source, and the context that one is opened with."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from warpo.engine.config.reward_sources import Source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from warpo.engine.config.sections import RewardSettings
    from warpo.engine.rollout.rewards.scores import Scored
    from warpo.engine.types import Completion, Prompt


@runtime_checkable
class RewardSource(Protocol):
    """Completions in, scores out."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """Finite scores, an entry for each completion; steps end at a token of the completion.

        Args:
            prompts: prompt of each completion.
            texts: the text of each completion, without special tokens.

        Raises:
            RewardError: it cannot score them.
        """
        ...

    def close(self) -> None:
        """End the processes of the source and give its memory back."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceContext:
    """Context that the sources of a run are opened with.

    Attributes:
        settings: the section `reward` of the config.
        fields: names of the data fields there will be.
        prompt: that of the first row: text or chat messages, as are all others.
        tokenizer: the policy's tokenizer.
        max_new_tokens: length limit of a completion.
        dtype, device, token_budget: of reward models; the budget in tokens per micro-batch.
    """

    settings: RewardSettings
    fields: Sequence[str]
    prompt: str | list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    dtype: str
    device: torch.device
    token_budget: int


def open_source(source: Source, context: SourceContext) -> RewardSource:
    """The source, ready to score.

    Raises:
        ConfigError, RewardError: it cannot be used.
    """
    opened: RewardSource = pkgutil.resolve_name(source.kind.opener)(source.target, context)
    return opened
