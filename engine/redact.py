"""Credentials of URLs, kept out of whatever is shown or written."""

from __future__ import annotations

import re
from typing import Any

# Up to the last @ of the line or the quoted text: a password may hold any character.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)[^\n'\"]*@", re.IGNORECASE)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s'\"?#]*)([?#])([^\s'\"]*)", re.IGNORECASE)


def redact(value: Any) -> Any:
    """The value, a text or a tree of them, with *** for the user, the password and the query values
    of each URL in it.
    """
    if isinstance(value, str):
        return _QUERY.sub(_hide_query, _USERINFO.sub(r"\1***@", value))
    if isinstance(value, dict):
        return {key: redact(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(entry) for entry in value]
    return value


def _hide_query(match: re.Match[str]) -> str:
    names = [pair.partition("=") for pair in match[3].split("&")]
    return f"{match[1]}{match[2]}" + "&".join(
        f"{name}=***" if equals else "***" for name, equals, _ in names
    )
