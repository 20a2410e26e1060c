"""Prompts and examples of a data set: all of it is checked and tokenised before a model is loaded.

A row is {"prompt": text or chat messages, further fields}. Chat messages go through the tokenizer's
chat template, with the header of the assistant's turn appended. Text is continued as it stands: it
gets the special tokens that the tokenizer puts before any text (a BOS where the model was trained
with one), and nothing after it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import jinja2
import numpy as np

from warpo.engine.errors import CheckpointError, DataError
from warpo.engine.rows import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as the model reads it, and its row for the reward function."""

    token_ids: list[int]
    fields: dict[str, Any]


def load_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[Prompt]:
    """The prompts of a data set, in its order.

    Args:
        path: a file or folder, as rows.py reads them.

    Raises:
        DataError: the data or a row of it is not usable; names the place and the reason.
    """
    rows = read_rows(Path(path), required=("prompt",))
    if "completions" in rows[0][1]:
        raise DataError(
            f"{rows[0][0]}: rename the field 'completions': "
            "reward functions get the sampled completions under that name"
        )
    ids = prompt_ids(rows, tokenizer)
    _check_lengths(
        rows,
        [len(prompt) for prompt in ids],
        max_prompt_tokens,
        "prompt",
        "rollout.max_model_len - rollout.max_new_tokens",
    )
    return [
        Prompt(token_ids=prompt, fields=row) for prompt, (_, row) in zip(ids, rows, strict=True)
    ]


def split_prompts(
    prompts: Sequence[Prompt], count: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and `count` others to be measured on, drawn at random by the seed.

    A prompt that occurs several times, by its token ids, is held out with all its occurrences, and
    the first of them is kept.

    Raises:
        DataError: there are not more different prompts than `count`.
    """
    first = {tuple(prompt.token_ids): prompt for prompt in reversed(prompts)}
    different = list(dict.fromkeys(tuple(prompt.token_ids) for prompt in prompts))
    if count >= len(different):
        raise DataError(
            f"data.eval = {count} would leave nothing to learn from: data.train holds "
            f"{len(different)} different prompts; lower it"
        )
    order = np.random.default_rng(seed).permutation(len(different))
    held_out = {different[i]: None for i in order[:count]}
    rest = [prompt for prompt in prompts if tuple(prompt.token_ids) not in held_out]
    return rest, [first[ids] for ids in held_out]


def columns(prompts: Sequence[Prompt]) -> dict[str, list]:
    """The fields of these prompts, one list for each field."""
    return {name: [p.fields[name] for p in prompts] for name in prompts[0].fields}


class HasTokens(Protocol):
    """Something read from a data set, known by its token ids."""

    @property
    def token_ids(self) -> list[int]: ...


T = TypeVar("T", bound=HasTokens)


class PromptStream(Generic[T]):
    """Prompts, or examples, in an endless shuffled order that (seed, epoch) alone determines.

    Every epoch draws each prompt once. A batch may span two epochs, so none is short. The whole
    state is one integer, the number of prompts drawn.
    """

    def __init__(self, prompts: Sequence[T], prompts_per_step: int, seed: int) -> None:
        self._prompts = prompts
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._position = 0
        self._data_crc = _crc(prompts)
        self._order_epoch = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)

    def next(self) -> list[T]:
        """The next `prompts_per_step` prompts."""
        return [self._draw() for _ in range(self._prompts_per_step)]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._position / len(self._prompts)

    def _draw(self) -> T:
        epoch, index = divmod(self._position, len(self._prompts))
        if epoch != self._order_epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._order, self._order_epoch = rng.permutation(len(self._prompts)), epoch
        self._position += 1
        return self._prompts[self._order[index]]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position, "seed": self._seed, "data_crc": self._data_crc}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            CheckpointError: seed or data are others than those of the state.
        """
        if state["seed"] != self._seed:
            raise CheckpointError(
                f"the checkpoint drew its prompts with seed {state['seed']}, this run has seed "
                f"{self._seed}: the order would change; set seed to {state['seed']}"
            )
        if state["data_crc"] != self._data_crc:
            raise CheckpointError(
                "data.train has changed since the checkpoint: its position means nothing in the "
                "new file; restore the file or start without resume"
            )
        self._position = state["position"]


def _crc(prompts: Sequence[HasTokens]) -> int:
    crc = 0
    for prompt in prompts:
        crc = zlib.crc32(np.asarray(prompt.token_ids, dtype=np.int64).tobytes(), crc)
    return crc


def prompt_ids(
    rows: Sequence[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of the prompt of each row.

    Raises:
        DataError: the tokenizer cannot make a prompt of one; names the place.
    """
    if isinstance(rows[0][1]["prompt"], list):
        texts = [_render(place, row["prompt"], tokenizer) for place, row in rows]
        # The template has written the special tokens already.
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer([row["prompt"] for _, row in rows])["input_ids"]
    for (place, _), prompt in zip(rows, ids, strict=True):
        if not prompt:
            raise DataError(f"{place}: the tokenizer makes no token of the prompt")
        if prompt[-1] == tokenizer.eos_token_id and not isinstance(rows[0][1]["prompt"], list):
            raise DataError(
                f"{place}: the prompt ends with the end-of-sequence token: remove it from "
                "the text, or set add_eos_token to false in the model's tokenizer_config.json"
            )
    return ids


def _render(place: str, messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{place}: the prompt is a list of chat messages, but the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has no chat template: "
            "write the prompts as text, or use a model with a template"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise DataError(f"{place}: the chat template refuses the messages: {error}") from None
    return str(text)


def _check_lengths(
    rows: Sequence[tuple[str, Row]], lengths: list[int], limit: int, what: str, setting: str
) -> None:
    too_long = [(row[0], n) for row, n in zip(rows, lengths, strict=True) if n > limit]
    if too_long:
        place, length = too_long[0]
        others = f" ({len(too_long) - 1} more are too long)" if len(too_long) > 1 else ""
        raise DataError(
            f"{place}: {what} of {length} tokens, at most {limit} fit ({setting}){others}: "
            f"raise rollout.max_model_len by {max(lengths) - limit}, or shorten the text"
        )
