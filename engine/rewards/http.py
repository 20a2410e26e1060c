"""Rewards from an HTTP server: one POST a call, retried until a deadline for the whole call.

Request, JSON:

    {"completions": [text, ...], "prompts": [text or chat messages, ...], further fields: [...]}

with one list for each field of the data, all of one length. Reply, JSON, status 200:

    {"rewards": [score, ...]}

A score is a number, or all of them are lists of [end, score], one pair for each step: `end` is the
number of characters of the completion up to the end of the step.

A refused or broken connection and the statuses 429, 500, 502, 503 and 504 are tried again, after
0.25 s, 0.5 s, 1 s, ..., at most 8 s. So the server may see the same completions twice.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from warpo.engine.errors import RewardError
from warpo.engine.rewards.scores import Steps, parse_scores

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_RETRIED = {429, 500, 502, 503, 504}


class RewardServer:
    """A URL as a callable: completions and data fields in, scores out.

    Args:
        deadline_s: seconds that one call may take, with all its retries.
        fields: names of the data fields there will be.

    Raises:
        RewardError: the URL is none, or a field has the name of another part of the request.
    """

    def __init__(self, url: str, *, deadline_s: float, fields: Sequence[str]) -> None:
        try:
            host = httpx.URL(url).host
        except httpx.InvalidURL as error:
            raise RewardError(f"reward server {url}: {error}") from None
        if not host:
            raise RewardError(f"reward server {url}: wanted http://HOST or http://HOST:PORT/PATH")
        if "prompts" in fields:
            raise RewardError(
                f"reward server {url}: rename the data field 'prompts': the field 'prompt' is "
                "sent under that name"
            )
        self._url = url
        self._deadline_s = deadline_s
        self._failure = "no answer yet"

    def __call__(
        self, completions: Sequence[str], fields: Mapping[str, list]
    ) -> list[float] | list[Steps]:
        """Finite scores, one entry for each completion.

        Raises:
            RewardError: the server refused, did not answer within the deadline, or answered
                nonsense.
        """
        body = self._body(completions, fields)
        self._failure = "no answer yet"
        try:
            reply = asyncio.run(asyncio.wait_for(self._post(body), self._deadline_s))
        except TimeoutError:
            raise RewardError(
                f"reward server {self._url} gave no rewards for {len(completions)} completions "
                f"within {self._deadline_s:g} s (last: {self._failure}): raise reward.deadline_s, "
                "or make the server faster"
            ) from None
        if not isinstance(reply, dict) or "rewards" not in reply:
            raise RewardError(
                f'reward server {self._url} must reply {{"rewards": [...]}}, replied {reply!r:.80}'
            )
        try:
            return parse_scores(reply["rewards"], completions)
        except RewardError as error:
            raise RewardError(f"reward server {self._url} {error}") from None

    def close(self) -> None:
        """Nothing stays open between calls."""

    def _body(self, completions: Sequence[str], fields: Mapping[str, list]) -> bytes:
        columns = {"prompts" if name == "prompt" else name: fields[name] for name in fields}
        try:
            return json.dumps({**columns, "completions": list(completions)}).encode()
        except TypeError:
            for name, column in columns.items():
                for i, value in enumerate(column):
                    if not _is_json(value):
                        raise RewardError(
                            f"reward server {self._url}: field {name!r} of completion {i} is no "
                            f"JSON but {type(value).__name__}: {value!r:.60}: write it as text in "
                            "the data"
                        ) from None
            raise

    async def _post(self, body: bytes) -> Any:
        """The JSON of the first reply that is no passing failure; the caller bounds the time."""
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(timeout=None) as client:
            for attempt in itertools.count():
                try:
                    response = await client.post(self._url, content=body, headers=headers)
                except httpx.TransportError as error:
                    self._failure = f"{type(error).__name__}: {error}"
                else:
                    self._failure = f"status {response.status_code}: {response.text!r:.200}"
                    if response.status_code not in _RETRIED:
                        return self._json(response)
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))

    def _json(self, response: httpx.Response) -> Any:
        if response.status_code != 200:
            raise RewardError(f"reward server {self._url} answered with {self._failure}")
        try:
            return response.json()
        except ValueError:
            raise RewardError(
                f"reward server {self._url} answered with no JSON: {response.text!r:.200}"
            ) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
