"""Prompts of a data set: all of it is checked and tokenised before a model is loaded.

A row is {"prompt": text or chat messages, further fields}. Chat messages go through the tokenizer's
chat template, with the header of the assistant's turn appended. Text is continued as it stands: it
gets the special tokens that the tokenizer puts before any text (a BOS where the model was trained
with one) unless it spells them out itself, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from torch import Tensor

from warpo.engine.data.chat import end_of_turn, render
from warpo.engine.data.json_lines import Row
from warpo.engine.data.rows import Rows, read_rows
from warpo.engine.data.stream import RowKeys, random_keys
from warpo.engine.data.tokens import Encoder, Ragged
from warpo.engine.errors import DataError
from warpo.engine.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts(Sequence[Prompt]):
    """The prompts of a data set, or some of them, in its order.

    Token ids lie in one array and rows as their file has them, so a prompt of 10 tokens takes 100
    bytes; as Python objects it would take 1000.

    Attributes:
        fields: names of the fields of each row.
    """

    def __init__(self, rows: Rows, ids: Ragged, keys: Tensor, chosen: np.ndarray) -> None:
        self._rows, self._ids, self._keys, self._chosen = rows, ids, keys, chosen
        self.fields = rows.fields

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = int(self._chosen[index])
        return Prompt(
            token_ids=self._ids[row],
            fields=self._rows[row],
            prompt_id=int(self._keys[row, 0]),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each."""
        return self._ids.lengths[self._chosen]

    @property
    def largest_token(self) -> int:
        """The largest token id of the data set."""
        return int(self._ids.largest)

    @property
    def keys(self) -> Tensor:
        """Return the keys of each row, as `RowKeys` makes them."""
        return self._keys[self._chosen]

    def select(self, places: np.ndarray) -> Prompts:
        """Those at these places."""
        return Prompts(self._rows, self._ids, self._keys, self._chosen[places])

    def token_digests(self) -> np.ndarray:
        """A hash of the token ids of each, uint64."""
        digests = (
            blake2b(np.asarray(self._ids[row], np.int32).tobytes(), digest_size=8).digest()
            for row in self._chosen.tolist()
        )
        return np.frombuffer(b"".join(digests), dtype=np.uint64)


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    check: Callable[[Row], None] = lambda row: None,
) -> Prompts:
    """The prompts of a data set, in its order.

    Args:
        path: a file or folder, as rows.py reads them.
        check: raises a DataError about a row that the rewards cannot use.

    Raises:
        DataError: the data or a row of it is not usable; names the place and the reason.
    """
    rows = read_rows(Path(path), required=("prompt",))
    if "completions" in rows.fields:
        raise DataError(
            f"{rows.place(0)}: rename the field 'completions': "
            "reward functions get the sampled completions under that name"
        )
    is_chat, eos = isinstance(rows[0]["prompt"], list), tokenizer.eos_token_id
    encoder, ids, keys = make_encoder(rows, tokenizer), Ragged("i"), RowKeys(rows.fields)
    for start, chunk in rows.chunks():
        rows.each(start, chunk, check)
        rows.each(start, chunk, keys.append)
        texts = rows.each(start, chunk, lambda row: prompt_text(row, tokenizer))
        found = rows.all(start, texts, encoder)
        rows.each(start, zip(chunk, found, strict=True), lambda pair: check_prompt(*pair, eos))
        for plain in found:
            ids.append(plain if is_chat else encoder.with_prefix(plain))
    _check_lengths(rows, ids.lengths, max_prompt_tokens)
    return Prompts(rows, ids, keys.tensor(), np.arange(len(rows)))


def make_encoder(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """An encoder for the prompts of these rows."""
    (encoder,) = rows.each(
        0,
        [rows[0]["prompt"]],
        lambda first: Encoder(tokenizer, first if isinstance(first, str) else ""),
    )
    return encoder


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt of a row as text.

    Raises:
        DataError: the chat template cannot make one.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    text = render(prompt, tokenizer)
    if not any(message["content"].strip() in text for message in prompt):
        end_of_turn(tokenizer)  # refuses a template that leaves out what is said as text
    return text


def check_prompt(row: Row, ids: list[int], eos_token_id: int | None) -> None:
    """
    Raises:
        DataError: the prompt has no token, or the text of one ends the sequence.
    """
    if not ids:
        raise DataError("the tokenizer makes no token of the prompt")
    if ids[-1] == eos_token_id and isinstance(row["prompt"], str):
        raise DataError(
            "the prompt ends with the end-of-sequence token: remove it from the text, nothing is "
            "to follow it"
        )


def _check_lengths(rows: Rows, lengths: np.ndarray, limit: int) -> None:
    (too_long,) = np.nonzero(lengths > limit)
    if len(too_long):
        others = f" ({len(too_long) - 1} more are too long)" if len(too_long) > 1 else ""
        raise DataError(
            f"{rows.place(int(too_long[0]))}: prompt of {lengths[too_long[0]]} tokens, at most "
            f"{limit} fit (rollout.max_model_len - rollout.max_new_tokens){others}: raise "
            f"rollout.max_model_len by {lengths.max() - limit}, or shorten the text"
        )


def split_prompts(prompts: Prompts, count: int, seed: int) -> tuple[Prompts, list[Prompt]]:
    """Prompts to learn from, and `count` others to be measured on, drawn at random by the seed.

    A prompt that occurs several times, by its token ids, is held out with all its occurrences, and
    the first of them is kept. Which are drawn hangs on what they say, not on where they stand.

    Raises:
        DataError: there are not more different prompts than `count`.
    """
    _, first, group = np.unique(prompts.token_digests(), return_index=True, return_inverse=True)
    if count >= len(first):
        raise DataError(
            f"data.eval = {count} would leave nothing to learn from: data.train holds "
            f"{len(first)} different prompts; lower it"
        )
    # as texts: a template may write today's date into the tokens
    numbers = prompts.keys[first, 0].numpy().view(np.uint64)
    chosen = np.argsort(random_keys(numbers, seed, 0), kind="stable")[:count]
    rest = prompts.select(np.flatnonzero(~np.isin(group, chosen)))
    return rest, [prompts[int(first[i])] for i in chosen]


def columns(prompts: Sequence[Prompt]) -> dict[str, list]:
    """The fields of these prompts, one list for each field."""
    return {name: [p.fields[name] for p in prompts] for name in prompts[0].fields}
