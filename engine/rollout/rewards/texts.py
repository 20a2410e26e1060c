"""Sources that read texts and data fields: the user's function, a server, math.

Their workers import this module with them, so it loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.calls import Callee, Calls
from warpo.engine.rollout.rewards.scores import Scored, Steps
from warpo.engine.rollout.rewards.steps import token_indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from warpo.engine.types import Completion, Prompt, TokenSteps


class TextScorer(Protocol):
    """Texts of completions and their data fields in, scores out; steps end at a character."""

    def __call__(self, completions: Sequence[str], fields: Mapping[str, list]) -> Scored: ...

    def close(self) -> None: ...


class TextSource:
    """A scorer of texts as a `RewardSource`."""

    def __init__(self, scorer: TextScorer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._scorer = scorer
        self._tokenizer = tokenizer

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """The scores; a step ends at the token that completes its text."""
        from warpo.engine.data.prompts import columns

        scored = self._scorer(texts, columns(prompts))
        if not isinstance(scored.scores[0], list):
            return scored
        rows: list[Any] = scored.scores
        by_token = [
            self._by_token(completion.token_ids.tolist(), text, steps)
            for completion, text, steps in zip(completions, texts, rows, strict=True)
        ]
        return replace(scored, scores=by_token)

    def close(self) -> None:
        """End the processes of the scorer."""
        self._scorer.close()

    def _by_token(self, ids: list[int], text: str, steps: Steps) -> TokenSteps:
        indices = token_indices(self._decode, ids, text, [end for end, _ in steps])
        return [(index, score) for index, (_, score) in zip(indices, steps, strict=True)]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def called(callee: Callee, context: SourceContext) -> TextSource:
    """A function or a server as a source, which treats failed calls as reward.on_error says."""
    settings = context.settings
    calls = Calls(callee, on_error=settings.on_error, deadline_s=settings.deadline_s)
    return TextSource(calls, context.tokenizer)
