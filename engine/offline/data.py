"""Examples of training from given data: every line is checked and tokenised before a model is
loaded.

The forms stand at `OfflineData.train`. A completion is followed by the end-of-sequence token, but
for the steps of process_reward, of which only the last token of each is scored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from warpo.engine.data import prompt_ids
from warpo.engine.errors import DataError
from warpo.engine.rows import check_text, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One line as the model reads it.

    Attributes:
        prompt_ids: what all completions continue.
        completions: one; chosen and rejected; best to worst; of kto that of the line, and one that
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
    def num_tokens(self) -> int:
        """Of its sequences, the prompt counted in each."""
        return sum(len(self.prompt_ids) + len(ids) for ids in self.completions)


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    algorithm: str,
    *,
    token_budget: int,
    max_length: int,
    step_separator: str = "\n",
) -> list[Example]:
    """The examples of a file in its order.

    Args:
        algorithm: a row of `LOSS_KEYS`; it determines the form.
        token_budget: what an example with all its completions must fit in.
        max_length: of prompt and completion, what the model has positions for.

    Raises:
        DataError: the file or a line of it is not usable; names file, line, reason.
    """
    required, texts_of, values_of = _FORMS.get(algorithm, _FORMS["dpo"])
    rows = read_rows(Path(path), required=("prompt", *required))
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no end-of-sequence token to end completions")
    places = [place for place, _ in rows]
    texts = [texts_of(place, row) for place, (_, row) in zip(places, rows, strict=True)]
    values = [values_of(place, row) for place, (_, row) in zip(places, rows, strict=True)]
    prompts = prompt_ids(rows, tokenizer)
    if algorithm == "process_reward":
        examples = _stepped(places, tokenizer, prompts, texts, values, step_separator)
    else:
        encoded = tokenizer([text for group in texts for text in group], add_special_tokens=False)
        ids = iter([*tokens, tokenizer.eos_token_id] for tokens in encoded["input_ids"])
        examples = [
            Example(
                prompt_ids=prompt, completions=[next(ids) for _ in group], values=numbers, ends=[]
            )
            for prompt, group, numbers in zip(prompts, texts, values, strict=True)
        ]
    if algorithm == "kto":
        examples = _with_unrelated(str(path), examples)
    _check_lengths(places, examples, token_budget, max_length)
    return examples


def _texts(*names: str) -> Callable[[Place, dict[str, Any]], list[str]]:
    """Reads completions from fields of text."""

    def read(place: Place, row: dict[str, Any]) -> list[str]:
        for name in names:
            check_text(f"{place}: {name}", row[name])
        return [row[name] for name in names]

    return read


def _list_of_texts(name: str, least: int) -> Callable[[Place, dict[str, Any]], list[str]]:
    """Reads completions, or steps, from a list."""

    def read(place: Place, row: dict[str, Any]) -> list[str]:
        texts = row[name]
        if not isinstance(texts, list) or len(texts) < least:
            raise DataError(
                f"{place}: {name} must be a list of {least} texts or more, got {texts!r:.60}"
            )
        for i, text in enumerate(texts):
            check_text(f"{place}: {name}[{i}]", text)
        return texts

    return read


def _no_values(place: Place, row: dict[str, Any]) -> list[float]:
    return []


def _margin(place: Place, row: dict[str, Any]) -> list[float]:
    margin = row.get("margin", 0.0)
    # `not (x >= 0)` catches NaN too; a bool is an int in Python
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e6:
        raise DataError(f"{place}: margin must be a number >= 0, got {margin!r:.60}")
    return [float(margin)]


def _verdict(place: Place, row: dict[str, Any]) -> list[float]:
    if not isinstance(row["label"], bool):
        raise DataError(f"{place}: label must be true or false, got {row['label']!r:.60}")
    return [float(row["label"])]


def _step_labels(place: Place, row: dict[str, Any]) -> list[float]:
    labels = row["labels"]
    if not isinstance(labels, list) or len(labels) != len(row["steps"]):
        raise DataError(
            f"{place}: labels must be a list of {len(row['steps'])} numbers, one for each step, "
            f"got {labels!r:.60}"
        )
    for i, label in enumerate(labels):
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise DataError(f"{place}: labels[{i}] must be a number from 0 to 1, got {label!r:.60}")
    return [float(label) for label in labels]


# Fields beside "prompt", what reads the completions and what reads the numbers. Rows that are not
# here have the form of dpo.
_FORMS: dict[str, tuple[tuple[str, ...], Callable[..., list[str]], Callable[..., list[float]]]] = {
    "sft": (("completion",), _texts("completion"), _no_values),
    "dpo": (("chosen", "rejected"), _texts("chosen", "rejected"), _no_values),
    "bradley_terry": (("chosen", "rejected"), _texts("chosen", "rejected"), _margin),
    "kto": (("completion", "label"), _texts("completion"), _verdict),
    "k_wise": (("completions",), _list_of_texts("completions", 2), _no_values),
    "process_reward": (("steps", "labels"), _list_of_texts("steps", 1), _step_labels),
}


def _stepped(
    places: Sequence[Place],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    steps: Sequence[list[str]],
    labels: Sequence[list[float]],
    separator: str,
) -> list[Example]:
    """Completions with the last token of each of their steps."""
    for place, texts in zip(places, steps, strict=True):
        _check_separators(place, texts, separator)
    if not tokenizer.is_fast:
        raise DataError(
            f"{places[0]}: the tokenizer of {tokenizer.name_or_path or 'this model'} does not tell "
            "where in the text a token is, and steps need one that does (a tokenizer.json)"
        )
    encoded = tokenizer(
        ["".join(texts) for texts in steps], add_special_tokens=False, return_offsets_mapping=True
    )
    examples = []
    for i, place in enumerate(places):
        token_ends = [stop for _, stop in encoded["offset_mapping"][i]]
        text_ends = list(accumulate(map(len, steps[i])))
        ends = [min(bisect_left(token_ends, end), len(token_ends) - 1) for end in text_ends]
        if not separator and len(ends) != len(token_ends):
            raise DataError(
                f"{place}: {len(token_ends)} tokens are in {len(ends)} steps: wanted one token a "
                "step, as data.step_separator is empty"
            )
        if len(set(ends)) < len(ends):
            raise DataError(f"{place}: two of its steps end in one token: join them")
        examples.append(
            Example(
                prompt_ids=prompts[i],
                completions=[encoded["input_ids"][i]],
                values=labels[i],
                ends=ends,
            )
        )
    return examples


def _check_separators(place: Place, steps: Sequence[str], separator: str) -> None:
    for i, step in enumerate(steps if separator else []):
        ended = step.endswith(separator) or i == len(steps) - 1
        if not ended or separator in step.removesuffix(separator):
            raise DataError(
                f"{place}: steps[{i}] must end with data.step_separator = {separator!r} and hold "
                f"it nowhere else, got {step!r:.60}"
            )


def _with_unrelated(path: str, examples: Sequence[Example]) -> list[Example]:
    """With the completion of the next example of another prompt, for KTO's reference point."""
    if all(example.prompt_ids == examples[0].prompt_ids for example in examples):
        raise DataError(
            f"{path}: kto needs two prompts that differ, to estimate the KL between them"
        )
    paired: list[Example] = []
    other = next(e for e in examples if e.prompt_ids != examples[-1].prompt_ids)
    for example, following in zip(reversed(examples), [other, *reversed(examples)], strict=False):
        if following.prompt_ids != example.prompt_ids:
            other = following
        paired.append(replace(example, completions=[*example.completions, other.completions[0]]))
    return paired[::-1]


def _check_lengths(
    places: Sequence[Place], examples: Sequence[Example], token_budget: int, max_length: int
) -> None:
    for place, example in zip(places, examples, strict=True):
        longest = len(example.prompt_ids) + max(map(len, example.completions))
        if longest > max_length:
            raise DataError(
                f"{place}: prompt and completion of {longest} tokens, the model has positions for "
                f"{max_length}: shorten the text"
            )
        if example.num_tokens > token_budget:
            raise DataError(
                f"{place}: {example.num_tokens} tokens with all completions, update.token_budget = "
                f"{token_budget}: raise it, or shorten the text"
            )
