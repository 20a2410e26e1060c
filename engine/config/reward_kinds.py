"""The kinds of reward sources: what is known of each before one is opened.

Nothing heavy is imported here: `warpo train --help` and the checks of a config read this table.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceKind:
    """A kind of reward source.

    Attributes:
        form: syntax of a source of it.
        help: its sentence in `warpo train --help`.
        read: the target of a source that is written like this; None if it is of another kind.
            Raises ValueError where it is of this kind and malformed.
        opener: "module:function"; of a target and a `SourceContext` it makes a `RewardSource`.
        row_check: "module:function" that raises DataError about a row of the data that the source
            would fail on; empty: it takes every row.
        prefix: text before the target.
        label: name of a source of it in the metrics: the kind, the target, or "either": the kind
            where there is one such source, the target where there are several.
        gives_steps: whether it scores the steps of a completion. "maybe": only a call shows it.
        is_checkpoint: the target is the folder of a model that the source holds.
    """

    name: str
    form: str
    help: str
    read: Callable[[str], str | None]
    opener: str
    row_check: str = ""
    prefix: str = ""
    label: Literal["kind", "target", "either"] = "kind"
    gives_steps: Literal["never", "maybe", "always"] = "never"
    is_checkpoint: bool = False


def _read_function(text: str) -> str | None:
    module, colon, name = text.partition(":")
    is_one = colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))
    return text if is_one else None


def _read_url(text: str) -> str | None:
    if not text.lower().startswith(("http://", "https://")):
        return None
    if re.search(r"\s", text):
        raise ValueError("a URL has no blanks: percent-encode them")
    return text


def _read_openrlhf(text: str) -> str | None:
    name, _, rest = text.partition(":")
    if name != "openrlhf":
        return None
    if (url := _read_url(rest)) is None:
        raise ValueError("wanted openrlhf:http://... or openrlhf:https://...")
    return url


def _read_word(word: str, text: str) -> str | None:
    return "" if text == word else None


def _read_folder(kind: str, text: str) -> str | None:
    name, _, rest = text.partition(":")
    if name != kind:
        return None
    folder = os.path.expanduser(rest)
    if not os.path.isdir(folder):
        raise ValueError(f"there is no directory {rest!r}")
    return folder


def _read_overlong(text: str) -> str | None:
    name, _, rest = text.partition(":")
    if name != "overlong":
        return None
    if not (rest.isdecimal() and len(rest) < 10 and int(rest) > 0):
        raise ValueError("wanted overlong:N, N tokens >= 1")
    return rest


_KINDS = (
    SourceKind(
        name="function",
        form="module:function",
        help="module:function, called as function(completions, **fields) -> list of numbers, or of "
        "lists of (characters up to the end of the step, score); the module is searched in the "
        "current directory too.",
        read=_read_function,
        opener="warpo.engine.rollout.rewards.function:open_source",
        label="target",
        gives_steps="maybe",
    ),
    SourceKind(
        name="http",
        form="http://..., https://...",
        help="http://... or https://..., a server.",
        read=_read_url,
        opener="warpo.engine.rollout.rewards.server:open_source",
        row_check="warpo.engine.rollout.rewards.server:check_row",
        label="either",
        gives_steps="maybe",
    ),
    SourceKind(
        name="openrlhf",
        form="openrlhf:http://...",
        help="openrlhf:http://... or openrlhf:https://..., a server of OpenRLHF's protocol.",
        read=_read_openrlhf,
        opener="warpo.engine.rollout.rewards.openrlhf:open_source",
        row_check="warpo.engine.rollout.rewards.server:check_row",
        prefix="openrlhf:",
        label="either",
    ),
    SourceKind(
        name="math",
        form="math",
        help="math: math-verify against the data field answer.",
        read=functools.partial(_read_word, "math"),
        opener="warpo.engine.rollout.rewards.math_answers:open_source",
        row_check="warpo.engine.rollout.rewards.math_answers:check_row",
        prefix="math",
    ),
    SourceKind(
        name="model",
        form="model:DIR",
        help="model:DIR: a reward model.",
        read=functools.partial(_read_folder, "model"),
        opener="warpo.engine.rollout.rewards.model:RewardModel",
        prefix="model:",
        label="either",
        is_checkpoint=True,
    ),
    SourceKind(
        name="process_model",
        form="process_model:DIR",
        help="process_model:DIR: one that scores steps.",
        read=functools.partial(_read_folder, "process_model"),
        opener="warpo.engine.rollout.rewards.model:ProcessRewardModel",
        prefix="process_model:",
        gives_steps="always",
        is_checkpoint=True,
    ),
    SourceKind(
        name="overlong",
        form="overlong:N",
        help="overlong:N: falls from 0 to -1 over the last N of rollout.max_new_tokens.",
        read=_read_overlong,
        opener="warpo.engine.rollout.rewards.overlong:OverlongPenalty",
        prefix="overlong:",
    ),
)
KINDS = {kind.name: kind for kind in _KINDS}
FORMS = f"{', '.join(kind.form for kind in _KINDS[:-1])} or {_KINDS[-1].form}"
HELP = " ".join(kind.help for kind in _KINDS)


def read_kind(text: str) -> tuple[SourceKind, str] | None:
    """The kind and the target of a source as it is written; None if it is of no kind.

    Raises:
        ValueError: it is of a kind, and malformed.
    """
    # The user's function is asked last: model:DIR would be one too.
    for kind in reversed(_KINDS):
        if (target := kind.read(text)) is not None:
            return kind, target
    return None
