"""Rewards from an HTTP server: one POST per call, retried until a deadline for the whole call.

Request, JSON:

    {"completions": [text, ...], "prompts": [text or chat messages, ...], further fields: [...]}

with one list for each field of the data, all of one length. Reply, JSON, status 200, plain or
gzip, 64 MiB at most:

    {"rewards": [score, ...]}

A score is a number, or all of them are lists of [end, score], one pair for each step: `end` is the
number of characters of the completion up to the end of the step.

A refused or broken connection and the statuses 429, 500, 502, 503 and 504 are tried again, after
0.25 s, 0.5 s, 1 s, ..., at most 8 s. So the server may see the same completions twice.

Credentials are those of ~/.netrc (or the file that NETRC names) for the host, or those of the URL,
http://USER:PASSWORD@HOST; they are sent as Basic authorization. No message, metric or file shows
those of a URL, nor the values of its query.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import json
import logging
import netrc
import os
import ssl
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import httpx

from warpo.engine.data.json_lines import Row
from warpo.engine.errors import DataError, RewardError
from warpo.engine.redact import redact
from warpo.engine.rollout.rewards.base import RewardSource, SourceContext
from warpo.engine.rollout.rewards.calls import Call
from warpo.engine.rollout.rewards.scores import Steps, parse_scores, shown
from warpo.engine.rollout.rewards.texts import called

MAX_REPLY_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
_RETRIED = {429, 500, 502, 503, 504}
_MANY_COMPLETIONS = "raise reward.deadline_s, or make the server faster"
# Shorter ones would be found in any text.
_SECRET_LENGTH = 4


def open_source(target: str, context: SourceContext) -> RewardSource:
    """`RewardServer` as the config has it."""
    settings = context.settings
    server = RewardServer(
        target, deadline_s=settings.deadline_s, fields=context.fields, workers=settings.workers
    )
    return called(server, context)


def check_row(row: Row) -> None:
    """Refuse a row that a request cannot hold."""
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError):
        for name, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise DataError(
                    f"reward server: the field {name!r:.60} is not JSON but "
                    f"{type(value).__name__}: {value!r:.60}: write it as text in the data"
                ) from None
        raise


class RewardServer:
    """A URL as a source of scores.

    Args:
        deadline_s: seconds that one call may take, with all its retries.
        fields: names of the data fields there will be.
        workers: requests at a time.

    Raises:
        RewardError: the URL is none, or a field has the name of another part of the request.
    """

    def __init__(
        self, url: str, *, deadline_s: float, fields: Sequence[str] = (), workers: int = 1
    ) -> None:
        self.name = f"reward server {redact(url)}"
        self.lanes = [self._ask] * workers
        self._url, self._auth, self._secrets = _parse(self.name, url)
        self._deadline_s = deadline_s
        if "prompts" in fields:
            raise RewardError(
                f"{self.name}: rename the data field 'prompts': the field 'prompt' is sent under "
                "that name"
            )
        # They log URLs and headers.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def close(self) -> None:
        """Nothing stays open between calls."""

    async def _ask(self, call: Call) -> list[float] | list[Steps]:
        """Finite scores, one entry for each completion.

        Raises:
            RewardError: the server refused, did not answer within the deadline, or answered
                nonsense.
        """
        try:
            client = httpx.AsyncClient(
                timeout=None, auth=self._auth, verify=_certificates(), headers=_HEADERS
            )
            post = _Post(client, self._url, self._body(call), len(call.completions))
            reply = await post.reply(self._deadline_s)
            if not isinstance(reply, dict) or "rewards" not in reply:
                raise RewardError(f'must reply {{"rewards": [...]}}, replied {shown(reply)}')
            return self.scores(reply["rewards"], call)
        except RewardError as error:
            # A server may repeat what it was sent.
            text = str(error)
            for secret in self._secrets:
                text = text.replace(secret, "***")
            raise RewardError(f"{self.name} {text}") from None

    def columns(self, call: Call) -> dict[str, Sequence[Any]]:
        """The lists of a request, an entry for each completion in each of them."""
        columns = {
            "prompts" if name == "prompt" else name: column for name, column in call.fields.items()
        }
        return {**columns, "completions": call.completions}

    def scores(self, rewards: Any, call: Call) -> list[float] | list[Steps]:
        """The `rewards` of a reply, checked."""
        return parse_scores(rewards, call.completions)

    def _body(self, call: Call) -> bytes:
        columns = {name: list(column) for name, column in self.columns(call).items()}
        try:
            return json.dumps(columns).encode()
        except TypeError:
            for name, column in columns.items():
                for i, value in enumerate(column):
                    if not _is_json(value):
                        raise RewardError(
                            f"reads JSON, and field {name!r} of completion {i} is not JSON but "
                            f"{type(value).__name__}: {value!r:.60}: write it as text in the data"
                        ) from None
            raise


class _Post:
    """One call: a POST, made again after passing failures."""

    def __init__(self, client: httpx.AsyncClient, url: httpx.URL, body: bytes, count: int) -> None:
        self._client, self._url, self._body, self._count = client, url, body, count
        self._failure, self._cure = "no answer yet", _MANY_COMPLETIONS

    async def reply(self, deadline_s: float) -> Any:
        """The JSON of the first reply that is not a passing failure.

        Raises:
            RewardError: there is none within the deadline, or it is refused.
        """
        try:
            async with asyncio.timeout(deadline_s), self._client:
                return await self._until_answered()
        except TimeoutError:
            raise RewardError(
                f"gave no rewards for {self._count} completions within {deadline_s:g} s "
                f"(last: {self._failure}): {self._cure}"
            ) from None

    async def _until_answered(self) -> Any:
        for attempt in itertools.count():
            try:
                async with self._client.stream("POST", self._url, content=self._body) as response:
                    status, body = response.status_code, await _read(response)
            except httpx.ConnectError as error:
                self._fail(error, "check that the server runs, and its host and port")
            except httpx.ProtocolError as error:
                self._fail(error, "check that the URL is that of an HTTP server, and its log")
            except (httpx.TransportError, UnicodeError) as error:
                self._fail(error, "check the network and the server's log")
            else:
                text = body[:1000].decode(errors="replace")
                self._failure = f"status {status}: {text!r:.200}"
                self._cure = "check the server's log"
                if status not in _RETRIED:
                    return _json(status, body, self._failure)
            await asyncio.sleep(min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))

    def _fail(self, error: Exception, cure: str) -> None:
        self._failure, self._cure = f"{type(error).__name__}: {error}", cure


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Reading them takes tens of milliseconds."""
    return httpx.create_ssl_context()


async def _read(response: httpx.Response) -> bytes:
    """The body, decompressed; the beginning of one that tells an error."""
    is_reply = response.status_code == 200
    limit = MAX_REPLY_BYTES if is_reply else _MAX_ERROR_BYTES
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise RewardError(f"replied in Content-Encoding {encoding:.40}: let it reply plain or gzip")
    inflate = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
    pieces, size, size_sent = [], 0, 0
    async for sent in response.aiter_raw():
        try:
            piece = inflate.decompress(sent, limit + 1 - size) if inflate else sent
        except zlib.error as error:
            if not is_reply:
                break
            raise RewardError(f"replied what is not gzip, as it says it is: {error}") from None
        pieces.append(piece)
        size, size_sent = size + len(piece), size_sent + len(sent)
        if max(size, size_sent) > limit:
            if is_reply:
                raise RewardError(
                    f"replied more than {limit >> 20} MiB: let it reply the rewards only"
                )
            break
    if is_reply and inflate and not inflate.eof:
        raise RewardError("replied gzip that is cut short: check the server's log")
    return b"".join(pieces)


def _json(status: int, body: bytes, failure: str) -> Any:
    if status != 200:
        raise RewardError(f"answered with {failure}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        beginning = body[:1000].decode(errors="replace")
        if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            raise RewardError(f"answered with no JSON: {beginning!r:.200}") from None
        raise RewardError(f"answered with JSON that cannot be read: {error}") from None


def _parse(name: str, url: str) -> tuple[httpx.URL, httpx.Auth | None, list[str]]:
    """The URL without credentials, what authorizes, and the texts to hide."""
    try:
        parsed = httpx.URL(url)
        port_fits = parsed.port is None or 0 < parsed.port < 1 << 16
    except (httpx.InvalidURL, ValueError) as error:
        # The text of the error may be a part of a password.
        why = "percent-encode user and password" if "@" in url else error
        raise RewardError(f"{name}: {why}") from None
    if not parsed.host or not port_fits:
        raise RewardError(f"{name}: wanted http://HOST or http://HOST:PORT/PATH")
    user, password = parsed.username, parsed.password
    auth: httpx.Auth | None = _from_netrc()
    secrets = [user, password]
    for pair in parsed.query.decode().split("&"):
        name_of_it, _, value = pair.partition("=")
        secrets += [value or name_of_it, unquote_plus(value or name_of_it)]
    if user or password:
        auth = httpx.BasicAuth(user, password)
        secrets.append(base64.b64encode(f"{user}:{password}".encode()).decode())
    hidden = [secret for secret in secrets if len(secret) >= _SECRET_LENGTH]
    return parsed.copy_with(userinfo=b""), auth, hidden


def _from_netrc() -> httpx.Auth | None:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return None
    try:
        return httpx.NetRCAuth(str(path))
    except OSError as error:
        raise RewardError(f"{path}: {error.strerror}") from None
    except netrc.NetrcParseError as error:
        raise RewardError(f"{path}:{error.lineno}: not a netrc file") from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
