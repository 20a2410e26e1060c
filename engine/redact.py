"""Credentials of URLs, kept out of whatever is shown or written."""

from __future__ import annotations

import re
from typing import Any

_QUOTED_OR_LINE = re.compile(r"(['\"\n])")
_WORD = re.compile(r"(\s)")
_QUERY = re.compile(r"[?#]")


def redact(value: Any) -> Any:
    """The value, a text or a tree of them, with *** for the user, the password and the query values
    of each URL in it.
    """
    if isinstance(value, str):
        return _redacted(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: redact(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(entry) for entry in value]
    return value


def _redacted(text: str) -> str:
    pieces = _QUOTED_OR_LINE.split(text)
    for i, piece in enumerate(pieces):
        scheme, mark, rest = piece.partition("://")
        if mark:
            # Up to the last @: a password may hold any character.
            _, at, rest_after = rest.rpartition("@")
            words = _WORD.split(f"{scheme}://***@{rest_after}" if at else piece)
            pieces[i] = "".join(map(_without_query, words))
    return "".join(pieces)


def _without_query(word: str) -> str:
    scheme, mark, rest = word.partition("://")
    found = _QUERY.search(rest) if mark else None
    if found is None:
        return word
    pairs = (pair.partition("=") for pair in rest[found.end() :].split("&"))
    return f"{scheme}://{rest[: found.end()]}" + "&".join(
        f"{name}=***" if equals else "***" for name, equals, _ in pairs
    )
