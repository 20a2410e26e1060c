"""The section of a run's settings for what is seen of it.

The text under a field is its line in `warpo train --help`.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from warpo.engine.config.sections import NonNegativeInt, checked


@dataclass(frozen=True, kw_only=True, config=checked)
class LogSettings:
    """What a run shows next to its table."""

    completions_every_steps: NonNegativeInt = 10
    """On a terminal, show the best and the worst completion of a prompt every N steps; 0: never."""
