"""Sources of rewards: the strings of reward.sources, parsed and checked.

Each is "[WEIGHT * ]SOURCE", the reward is the weighted sum, of weight 0 a source is only measured,
and SOURCE is of one of the kinds in kinds.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from warpo.engine.config.reward_kinds import FORMS, SourceKind, read_kind
from warpo.engine.errors import ConfigError
from warpo.engine.redact import redact

_WEIGHT = re.compile(r"([^*:/@]*)\*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One of the sources.

    Attributes:
        name: its name in the metrics: the kind, or module:function; no credentials.
        target: argument of the kind: URL, directory, module:function or number.
    """

    name: str
    kind: SourceKind
    target: str = field(repr=False)
    weight: float

    @property
    def may_give_steps(self) -> bool:
        return self.kind.gives_steps != "never"

    @property
    def checkpoint(self) -> str | None:
        """The folder of the model that it holds."""
        return self.target if self.kind.is_checkpoint else None


def parse_sources(sources: Sequence[str]) -> list[Source]:
    """The sources in the order given.

    Raises:
        ConfigError: one of them is malformed, or two are process reward models.
    """
    parsed = [_parse(text.strip()) for text in sources]
    process = [source for source in parsed if source.kind.gives_steps == "always"]
    if len(process) > 1:
        raise ConfigError(
            "reward.sources has two process reward models, "
            f"{' and '.join(source.target for source in process)}: one source may score steps"
        )
    counts = Counter(source.name for source in parsed if source.kind.label == "either")
    for written, count in Counter(s.kind.prefix + s.target for s in parsed).items():
        if count > 1:
            raise ConfigError(
                f"reward.sources names {written} {count} times: give it once, with the sum of the "
                "weights"
            )
    named = [
        replace(source, name=redact(source.target)) if counts[source.name] > 1 else source
        for source in parsed
    ]
    taken = Counter(source.name for source in named)
    return [
        replace(source, name=f"{source.name} #{i + 1}") if taken[source.name] > 1 else source
        for i, source in enumerate(named)
    ]


def same_source(text: str, other: str) -> bool:
    """True if two texts name one source, whatever their weights."""
    a, b = _parse(text.strip()), _parse(other.strip())
    return (a.kind.name, a.target) == (b.kind.name, b.target)


def _parse(text: str) -> Source:
    # A URL without its scheme may hold a password too.
    place = f"reward.sources: {re.sub('.*@', '***@', redact(text), flags=re.DOTALL)!r}"
    weight = 1.0
    if match := _WEIGHT.fullmatch(text):
        weight, text = _weight(place, match[1]), match[2].strip()
    try:
        found = read_kind(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    if found is None:
        raise ConfigError(f"{place}: wanted {FORMS}, with 'WEIGHT * ' before it or without")
    kind, target = found
    name = target if kind.label == "target" else kind.name
    return Source(name=name, kind=kind, target=target, weight=weight)


def _weight(place: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise ConfigError(f"{place}: the weight {text.strip()!r} is not a number") from None
    if not math.isfinite(weight):
        raise ConfigError(f"{place}: the weight must be finite")
    return weight
