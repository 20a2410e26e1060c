"""Examples of training from given data: all of it is checked and tokenised before a model is
loaded.

The forms stand at `OfflineData.train`. A completion goes on where its prompt ends, letter by
letter, and is followed by the token that ends it: after chat messages the one with which the chat
template ends a turn, after text the end-of-sequence token. One that ends with such a token itself
gets no other. The steps of process_reward get none: the last token of each is scored.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from torch import Tensor

from warpo.engine.data.chat import end_of_turn
from warpo.engine.data.json_lines import Row
from warpo.engine.data.prompts import check_prompt, make_encoder, prompt_text
from warpo.engine.data.rows import Rows, check_text, read_rows
from warpo.engine.data.stream import RowKeys
from warpo.engine.data.tokens import Encoder, Ragged
from warpo.engine.errors import DataError
from warpo.engine.types import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row as the model reads it.

    Attributes:
        prompt_ids: the prompt that all completions continue.
        completions: one; chosen and rejected; best to worst; of kto that of the row, and one that
            belongs to another prompt.
        values: the margin of a pair, 1 or 0 for a verdict, a label for each step; else empty.
        ends: index in the completion of the last token of each step.
        ref_logprobs: of the reference, a tensor for each completion; empty where none is needed.
    """

    prompt_ids: list[int]
    completions: list[list[int]]
    values: list[float]
    ends: list[int]
    ref_logprobs: tuple[Tensor, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *(token for ids in self.completions for token in ids)]

    @property
    def sequences(self) -> list[TokenSequence]:
        """The prompt with each completion."""
        return [self.sequence(i) for i in range(len(self.completions))]

    def sequence(self, i: int) -> TokenSequence:
        """The prompt with the completion of this number."""
        return TokenSequence.of(self.prompt_ids, self.completions[i])

    @property
    def num_tokens(self) -> int:
        """Number of tokens of its sequences, the prompt counted in each."""
        return sum(len(self.prompt_ids) + len(ids) for ids in self.completions)


class Examples(Sequence[Example]):
    """The examples of a data set in its order, all numbers in a few arrays.

    Attributes:
        keys: keys of each row, as `RowKeys` makes them.
    """

    def __init__(self) -> None:
        self.keys: Tensor
        self._prompts, self._completions = Ragged("i"), Ragged("i")
        self._values, self._ends = Ragged("d"), Ragged("q")
        self._starts = array("q", [0])
        # of kto, for each example a completion of another prompt
        self._unrelated: np.ndarray | None = None

    def append(
        self,
        prompt: list[int],
        completions: Sequence[list[int]],
        values: list[float],
        ends: list[int],
    ) -> None:
        self._prompts.append(prompt)
        for ids in completions:
            self._completions.append(ids)
        self._values.append(values)
        self._ends.append(ends)
        self._starts.append(len(self._completions))

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        own = [*range(self._starts[index], self._starts[index + 1])]
        unrelated = [] if self._unrelated is None else [int(self._unrelated[index])]
        return Example(
            prompt_ids=self._prompts[index],
            completions=[self._completions[i] for i in [*own, *unrelated]],
            values=self._values[index],
            ends=self._ends[index],
        )

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return int(max(self._prompts.largest, self._completions.largest))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        owners = np.repeat(np.arange(len(self)), np.diff(np.frombuffer(self._starts, np.int64)))
        return int((self._prompts.lengths[owners] + self._completions.lengths).max())

    def add_unrelated(self, path: Path) -> None:
        """Give each the completion of the next example of another prompt, for KTO's reference
        point.
        """
        count = len(self)
        prompts = self.keys[:, 0].tolist()
        if len(set(prompts)) < 2:
            raise DataError(
                f"{path}: kto needs two prompts that differ, to estimate the KL between them"
            )
        self._unrelated = np.empty(count, dtype=np.int64)
        other = next(i for i in range(count) if prompts[i] != prompts[-1])
        for index in reversed(range(count)):
            following = (index + 1) % count
            if prompts[following] != prompts[index]:
                other = following
            self._unrelated[index] = other

    def check_lengths(self, rows: Rows, token_budget: int, max_length: int) -> None:
        """
        Raises:
            DataError: an example is longer than one of the two; names its place.
        """
        completions, starts = self._completions.lengths, np.asarray(self._starts)
        prompts = self._prompts.lengths
        longest = np.maximum.reduceat(completions, starts[:-1])
        total = np.add.reduceat(completions, starts[:-1])
        if self._unrelated is not None:
            others = completions[self._unrelated]
            longest, total = np.maximum(longest, others), total + others
        longest, total = prompts + longest, prompts + total
        bad = np.flatnonzero((longest > max_length) | (total > token_budget))
        if not len(bad):
            return
        place, index = rows.place(int(bad[0])), bad[0]
        if longest[index] > max_length:
            raise DataError(
                f"{place}: prompt and completion of {longest[index]} tokens, the model has "
                f"positions for {max_length}: shorten the text"
            )
        raise DataError(
            f"{place}: {total[index]} tokens with all completions, update.token_budget = "
            f"{token_budget}: raise it, or shorten the text"
        )


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    algorithm: str,
    *,
    token_budget: int,
    max_length: int,
    step_separator: str = "\n",
) -> Examples:
    """The examples of a data set in its order.

    Args:
        algorithm: a row of `LOSS_KEYS`; it determines the form.
        token_budget: budget that an example with all its completions must fit.
        max_length: positions of the model, for prompt and completion together.

    Raises:
        DataError: the data or a row of it is not usable; names place and reason.
    """
    required, texts_of, values_of = _FORMS.get(algorithm, _FORMS["dpo"])
    rows = read_rows(Path(path), required=("prompt", *required))
    is_chat = isinstance(rows[0]["prompt"], list)
    ending = Ending(Path(path), tokenizer, is_chat)
    encoder, keys = make_encoder(rows, tokenizer), RowKeys(rows.fields)
    examples = Examples()
    stepped, eos = algorithm == "process_reward", tokenizer.eos_token_id

    def add(row: Row, prompt: str, ids: list[int], completions: list[list[int]]) -> None:
        check_prompt(row, ids, eos)
        ends: list[int] = []
        if stepped:
            completion, ends = _steps(row["steps"], encoder, prompt, ids, step_separator)
            completions = [completion]
        prompt_ids = ids if is_chat else encoder.with_prefix(ids)
        examples.append(prompt_ids, completions, values_of(row), ends)

    for start, chunk in rows.chunks():
        rows.each(start, chunk, keys.append)
        texts = rows.each(start, chunk, texts_of)
        prompts = rows.each(start, chunk, lambda row: prompt_text(row, tokenizer))
        ids = rows.all(start, prompts, encoder)
        completions: list[list[list[int]]] = [[] for _ in chunk]
        if not stepped:
            groups = list(zip(prompts, ids, texts, strict=True))
            completions = rows.all(
                start, groups, lambda chosen: _continuations(encoder, chosen, ending)
            )
        rows.each(
            start, zip(chunk, prompts, ids, completions, strict=True), lambda parts: add(*parts)
        )
    examples.keys = keys.tensor()
    if algorithm == "kto":
        examples.add_unrelated(Path(path))
    examples.check_lengths(rows, token_budget, max_length)
    return examples


class Ending:
    """The tokens that end a completion."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> None:
        self._tokens: list[int] = []
        if is_chat:
            try:
                self._tokens = end_of_turn(tokenizer)
            except DataError as error:
                raise DataError(f"{path}: no end of a turn: {error}") from None
        eos = tokenizer.eos_token_id
        if not self._tokens:
            if eos is None:
                raise DataError(
                    f"{path}: the tokenizer has no end-of-sequence token to end completions"
                )
            self._tokens = [eos]
        self._last = {self._tokens[-1], eos}

    def __call__(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self._last else [*ids, *self._tokens]


def _continuations(
    encoder: Encoder, groups: Sequence[tuple[str, list[int], list[str]]], ending: Ending
) -> list[list[list[int]]]:
    """The completions of each prompt, ended.

    Args:
        groups: for each the prompt, its ids, and the texts that continue it.
    """
    single = [(prompt, ids, text) for prompt, ids, texts in groups for text in texts]
    found = iter(encoder.continuations(*map(list, zip(*single, strict=True))))
    return [[ending(next(found)) for _ in texts] for _, _, texts in groups]


def _texts(*names: str) -> Callable[[Row], list[str]]:
    """Reads completions from fields of text."""

    def read(row: Row) -> list[str]:
        for name in names:
            check_text(name, row[name])
        return [row[name] for name in names]

    return read


def _list_of_texts(name: str, least: int) -> Callable[[Row], list[str]]:
    """Reads completions, or steps, from a list."""

    def read(row: Row) -> list[str]:
        texts = row[name]
        if not isinstance(texts, list) or len(texts) < least:
            raise DataError(f"{name} must be a list of {least} texts or more, got {texts!r:.60}")
        for i, text in enumerate(texts):
            check_text(f"{name}[{i}]", text)
        return texts

    return read


def _no_values(row: Row) -> list[float]:
    return []


def _margin(row: Row) -> list[float]:
    margin = row.get("margin", 0.0)
    # `not (x >= 0)` catches NaN too; a bool is an int in Python
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e6:
        raise DataError(f"margin must be a number >= 0, got {margin!r:.60}")
    return [float(margin)]


def _verdict(row: Row) -> list[float]:
    if not isinstance(row["label"], bool):
        raise DataError(f"label must be true or false, got {row['label']!r:.60}")
    return [float(row["label"])]


def _step_labels(row: Row) -> list[float]:
    labels = row["labels"]
    if not isinstance(labels, list) or len(labels) != len(row["steps"]):
        raise DataError(
            f"labels must be a list of {len(row['steps'])} numbers, one for each step, "
            f"got {labels!r:.60}"
        )
    for i, label in enumerate(labels):
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise DataError(f"labels[{i}] must be a number from 0 to 1, got {label!r:.60}")
    return [float(label) for label in labels]


# Fields besides "prompt", what reads the completions and what reads the numbers. Rows that are not
# here have the form of dpo.
_FORMS: dict[str, tuple[tuple[str, ...], Callable[..., list[str]], Callable[..., list[float]]]] = {
    "sft": (("completion",), _texts("completion"), _no_values),
    "dpo": (("chosen", "rejected"), _texts("chosen", "rejected"), _no_values),
    "bradley_terry": (("chosen", "rejected"), _texts("chosen", "rejected"), _margin),
    "kto": (("completion", "label"), _texts("completion"), _verdict),
    "k_wise": (("completions",), _list_of_texts("completions", 2), _no_values),
    "process_reward": (("steps", "labels"), _list_of_texts("steps", 1), _step_labels),
}


def _steps(
    steps: list[str], encoder: Encoder, prompt: str, prompt_ids: list[int], separator: str
) -> tuple[list[int], list[int]]:
    """The completion that the steps make, and the last token of each of them."""
    for i, step in enumerate(steps if separator else []):
        ended = step.endswith(separator) or i == len(steps) - 1
        if not ended or separator in step.removesuffix(separator):
            raise DataError(
                f"steps[{i}] must end with data.step_separator = {separator!r} and hold it "
                f"nowhere else, got {step!r:.60}"
            )
    ids, token_ends = encoder.continuation_with_ends(prompt, prompt_ids, "".join(steps))
    if not ids:
        raise DataError("the tokenizer makes no token of the steps")
    text_ends = accumulate(map(len, steps))
    ends = [min(bisect_left(token_ends, end), len(token_ends) - 1) for end in text_ends]
    if not separator and len(ends) != len(token_ends):
        raise DataError(
            f"{len(token_ends)} tokens are in {len(ends)} steps: wanted one token per step, as "
            "data.step_separator is empty"
        )
    if len(set(ends)) < len(ends):
        raise DataError("two of its steps end in one token: join them")
    return ids, ends
