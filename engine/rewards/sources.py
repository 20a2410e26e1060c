"""Where rewards come from: the strings of reward.sources, read and checked.

Each is "[WEIGHT * ]SOURCE", the reward is the weighted sum, of weight 0 a source is only measured,
and SOURCE is one of

    module:function         the user's function, function.py
    http://..., https://... a server, http.py
    math                    math-verify against the data field `answer`, math.py
    model:DIR               reward model: its score at the last token of prompt + completion
    process_model:DIR       process reward model: its score at the end of each step
    overlong:N              soft punishment of long completions, overlong.py
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from warpo.engine.errors import ConfigError
from warpo.engine.redact import redact

KINDS = "module:function, http://..., https://..., math, model:DIR, process_model:DIR or overlong:N"
_WEIGHT = re.compile(r"([^*:/@]*)\*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One of the sources.

    Attributes:
        name: what the metrics call it: the kind, or module:function; no credentials.
        kind: function, http, math, model, process_model or overlong.
        target: what the kind is applied to: URL, directory, module:function or number.
    """

    name: str
    kind: str
    target: str = field(repr=False)
    weight: float

    @property
    def may_give_steps(self) -> bool:
        """Whether it may score steps. A process model does; function and server as they like."""
        return self.kind in ("function", "http", "process_model")


def parse_sources(sources: Sequence[str]) -> list[Source]:
    """The sources in the order given.

    Raises:
        ConfigError: one of them is malformed, or two are process reward models.
    """
    parsed = [_parse(text.strip()) for text in sources]
    process = [source for source in parsed if source.kind == "process_model"]
    if len(process) > 1:
        raise ConfigError(
            "reward.sources has two process reward models, "
            f"{' and '.join(source.target for source in process)}: one source may score steps"
        )
    counts = Counter(source.name for source in parsed if source.kind in ("http", "model"))
    for (kind, target), count in Counter((s.kind, s.target) for s in parsed).items():
        if count > 1:
            name = (
                target if kind in ("http", "function") else ":".join(filter(None, (kind, target)))
            )
            raise ConfigError(
                f"reward.sources names {name} {count} times: give it once, with the sum of the "
                "weights"
            )
    # Several servers or models are told apart by what follows the kind.
    named = [
        replace(source, name=redact(source.target)) if counts[source.name] > 1 else source
        for source in parsed
    ]
    taken = Counter(source.name for source in named)
    return [
        replace(source, name=f"{source.name} #{i + 1}") if taken[source.name] > 1 else source
        for i, source in enumerate(named)
    ]


def _parse(text: str) -> Source:
    # A URL without its scheme may hold a password too.
    place = f"reward.sources: {re.sub('.*@', '***@', redact(text), flags=re.DOTALL)!r}"
    weight, target = 1.0, text
    if (match := _WEIGHT.fullmatch(text)) and not _is_url(text):
        weight, target = _weight(place, match[1]), match[2].strip()
    kind, colon, rest = target.partition(":")
    if _is_url(target):
        if re.search(r"\s", target):
            raise ConfigError(f"{place}: a URL has no blanks: percent-encode them")
        return Source(name="http", kind="http", target=target, weight=weight)
    if target == "math":
        return Source(name="math", kind="math", target="", weight=weight)
    if kind in ("model", "process_model"):
        folder = os.path.expanduser(rest)
        if not os.path.isdir(folder):
            raise ConfigError(f"{place}: there is no directory {rest!r}")
        return Source(name=kind, kind=kind, target=folder, weight=weight)
    if kind == "overlong":
        if not (rest.isdecimal() and len(rest) < 10 and int(rest) > 0):
            raise ConfigError(f"{place}: wanted overlong:N, N tokens >= 1")
        return Source(name=kind, kind=kind, target=rest, weight=weight)
    if not (colon and rest.isidentifier() and all(map(str.isidentifier, kind.split(".")))):
        raise ConfigError(f"{place}: wanted {KINDS}, with 'WEIGHT * ' before it or without")
    return Source(name=target, kind="function", target=target, weight=weight)


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _weight(place: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise ConfigError(f"{place}: the weight {text.strip()!r} is no number") from None
    if not math.isfinite(weight):
        raise ConfigError(f"{place}: the weight must be finite")
    return weight
