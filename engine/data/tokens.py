"""From texts to token ids: special tokens once, and texts that join as the tokenizer joins them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from warpo.engine.errors import DataError, one_line

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# Texts that a completion is tokenised behind where it merges with the end of its prompt: one of
# them will not merge with it.
_ANCHORS = ("\n", ":", "a", "0", "=", "中")
_CHARACTERS_AT_ONCE = 1 << 20


class Ragged:
    """Lists of numbers, kept one after the other in one array: of 32 or 64 bits a number.

    Args:
        typecode: typecode of `array.array`.
    """

    def __init__(self, typecode: str) -> None:
        self._numbers: array[Any] = array(typecode)
        self._starts = array("q", [0])

    def append(self, numbers: Sequence[float]) -> None:
        self._numbers.extend(numbers)
        self._starts.append(len(self._numbers))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[Any]:
        return self._numbers[self._starts[index] : self._starts[index + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Length of each list, int64."""
        return np.diff(np.frombuffer(self._starts, dtype=np.int64))

    @property
    def largest(self) -> float:
        """Largest of all numbers; 0 if there are none."""
        return max(self._numbers, default=0)


class Tokens(NamedTuple):
    """Token ids, and the number of characters of the text up to the end of each."""

    ids: list[int]
    ends: list[int]


class Encoder:
    """A tokenizer, for texts that are parts of a sequence.

    Args:
        sample: a text, to see what the tokenizer puts before any.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sample: str) -> None:
        self._tokenizer, self._unknown = tokenizer, tokenizer.unk_token_id
        # The calls also tell the backend to neither cut nor pad, as its file may have it.
        plain = self._call(sample, add_special_tokens=False)
        whole = self._call(sample)
        places = (i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain)
        self._prefix = whole[: next(places, 0)]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens besides those that it spells out.

        Raises:
            DataError: the tokenizer fails on one of them.
        """
        if not self._tokenizer.is_fast:
            return [self._call(text, add_special_tokens=False) for text in texts]
        # half the time of the tokenizer's own call, which makes masks and copies
        encode = self._tokenizer.backend_tokenizer.encode_batch_fast
        return [
            encoding.ids
            for batch in _batches(texts)
            for encoding in _attempt(encode, batch, add_special_tokens=False)
        ]

    def _call(self, text: str, **options: bool) -> list[int]:
        return list(_attempt(self._tokenizer, text, **options)["input_ids"])

    def with_prefix(self, ids: list[int]) -> list[int]:
        """The ids of a text behind the special tokens that the tokenizer puts before any text, a
        BOS or nothing; once, also where the text spells them out.
        """
        return ids if ids[: len(self._prefix)] == self._prefix else [*self._prefix, *ids]

    def continuations(
        self, prompts: Sequence[str], prompt_ids: Sequence[list[int]], texts: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of each text as it goes on after its prompt.

        They are what follows the prompt's tokens in the tokenisation of both as one text. Where a
        token would span the border, the prompt keeps the tokens that it is sampled from with.

        Args:
            prompt_ids: ids of the prompts, without special tokens.
        """
        joined = self([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return [
            ids[len(before) :]
            if self._is_certain(before) and ids[: len(before)] == before
            else self._slowly(prompt, before, text)
            for prompt, before, text, ids in zip(prompts, prompt_ids, texts, joined, strict=True)
        ]

    def _is_certain(self, before: list[int]) -> bool:
        """True if equal ids mean equal tokens: an unknown word stays one if it grows."""
        return bool(before) and before[-1] != self._unknown

    def _slowly(self, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        if self._tokenizer.is_fast:
            return self.continuation_with_ends(prompt, prompt_ids, text).ids
        return self([text])[0]

    def continuation_with_ends(self, prompt: str, prompt_ids: list[int], text: str) -> Tokens:
        """The same of one text, with the ends of its tokens.

        Raises:
            DataError: the tokenizer does not tell them.
        """
        if not self._tokenizer.is_fast:
            raise DataError(
                f"the tokenizer of {self._tokenizer.name_or_path or 'this model'} does not tell "
                "where in the text a token is, and steps need one that does (a tokenizer.json)"
            )
        joined = next(self._encode([prompt + text]))
        if _starts_with(joined, prompt_ids, len(prompt)):
            return _rest(joined, len(prompt_ids), len(prompt))
        return self._alone(text)

    def _alone(self, text: str) -> Tokens:
        """The text behind one that it does not merge with, so that it gets no space of its own, as
        SentencePiece gives to the beginning of a text.
        """
        for anchor in _ANCHORS:
            before, joined = self._encode([anchor, anchor + text])
            if _starts_with(joined, before.ids, len(anchor)):
                return _rest(joined, len(before.ids), len(anchor))
        return _rest(next(self._encode([text])), 0, 0)

    def _encode(self, texts: Sequence[str]) -> Iterator[Encoding]:
        encode = self._tokenizer.backend_tokenizer.encode_batch
        for batch in _batches(texts):
            yield from _attempt(encode, batch, add_special_tokens=False)


def _attempt(encode: Callable[..., Any], texts: Any, **options: bool) -> Any:
    try:
        return encode(texts, **options)
    except Exception as error:  # the backend's errors are plain ones: a word without a token
        raise DataError(f"the tokenizer fails on the text: {one_line(error)}") from None


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in turn, few enough at once: the backend takes 80 bytes per token."""
    start, characters = 0, 0
    for i, text in enumerate(texts):
        if i > start and characters + len(text) > _CHARACTERS_AT_ONCE:
            yield texts[start:i]
            start, characters = i, 0
        characters += len(text)
    if start < len(texts):
        yield texts[start:]


def _starts_with(joined: Encoding, before: list[int], border: int) -> bool:
    """True if the tokens of a text are `before`, then those of what follows its border."""
    count = len(before)
    if joined.ids[:count] != before:
        return False
    last = joined.token_to_chars(count - 1) if count else (0, 0)
    first = joined.token_to_chars(count) if count < len(joined.ids) else (border, border)
    return last is not None and first is not None and last[1] <= border <= first[0]


def _rest(joined: Encoding, count: int, border: int) -> Tokens:
    return Tokens(joined.ids[count:], [stop - border for _, stop in joined.offsets[count:]])
