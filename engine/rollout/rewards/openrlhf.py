"""Rewards from a server that speaks OpenRLHF's protocol, as `openrlhf.cli.serve_rm` does.

Request, JSON, one entry for each completion in each list:

    {"query": [text, ...], "prompts": [text, ...], "labels": [...]}

query is the text of the tokens of prompt and completion, special tokens included; prompts that of
the prompt's tokens, so that a query less its prompt is the completion; labels the data field that
reward.label_field names, or "" where it names none. Reply, JSON:

    {"rewards": [score, ...]}

A score is a number. Other entries, scores and extra_logs, are not read: OpenRLHF trains on rewards,
and these are for its filter and its log. Retries, deadline, workers and credentials are those of
server.py.

Source: SingleTurnAgentExecutor in openrlhf/utils/agent.py, https://github.com/OpenRLHF/OpenRLHF
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.rollout.rewards.base import RewardSource, SourceContext
from warpo.engine.rollout.rewards.calls import Call, Calls
from warpo.engine.rollout.rewards.scores import Scored, shown
from warpo.engine.rollout.rewards.server import RewardServer

if TYPE_CHECKING:
    from warpo.engine.types import Completion, Prompt


def open_source(target: str, context: SourceContext) -> RewardSource:
    """`OpenRLHFSource` of the URL behind openrlhf:."""
    return OpenRLHFSource(target, context)


class OpenRLHFServer(RewardServer):
    """`RewardServer` with OpenRLHF's request; it scores whole completions only."""

    def columns(self, call: Call) -> dict[str, Sequence[Any]]:
        """query, prompts and labels, which the source has made."""
        return dict(call.fields)

    def scores(self, rewards: Any, call: Call) -> list[float]:
        """One number for each completion."""
        if isinstance(rewards, list) and any(isinstance(entry, list) for entry in rewards):
            raise RewardError(f"must reply a number for each completion, replied {shown(rewards)}")
        scores: list[Any] = super().scores(rewards, call)
        return scores


class OpenRLHFSource:
    """A server of OpenRLHF's protocol as a `RewardSource`.

    Raises:
        ConfigError: the data have no field of the name of reward.label_field.
        RewardError: the URL is none.
    """

    def __init__(self, url: str, context: SourceContext) -> None:
        settings = context.settings
        self._tokenizer, self._label_field = context.tokenizer, settings.label_field
        if self._label_field and self._label_field not in context.fields:
            raise ConfigError(
                f"reward.label_field = {self._label_field!r}: data.train has no such field, but "
                f"{', '.join(context.fields)}"
            )
        server = OpenRLHFServer(url, deadline_s=settings.deadline_s, workers=settings.workers)
        self._calls = Calls(server, on_error=settings.on_error, deadline_s=settings.deadline_s)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """The rewards of the server."""
        pairs = zip(prompts, completions, strict=True)
        query = [
            [*prompt.token_ids, *completion.token_ids.tolist()] for prompt, completion in pairs
        ]
        field = self._label_field
        return self._calls(
            texts,
            {
                "query": self._decode(query),
                "prompts": self._decode([prompt.token_ids for prompt in prompts]),
                "labels": [prompt.fields[field] if field else "" for prompt in prompts],
            },
        )

    def close(self) -> None:
        """Nothing stays open between calls."""
        self._calls.close()

    def _decode(self, ids: list[list[int]]) -> list[str]:
        return list(self._tokenizer.batch_decode(ids, skip_special_tokens=False))
