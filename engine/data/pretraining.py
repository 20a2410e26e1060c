"""Examples that are mixed into the updates of a policy: completions of prompts, or plain texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from warpo.engine.data.examples import Ending, Examples, load_examples
from warpo.engine.data.rows import Rows, read_rows
from warpo.engine.data.stream import RowKeys
from warpo.engine.data.tokens import Encoder
from warpo.engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_pretraining(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, token_budget: int, max_length: int
) -> Examples:
    """The examples of pretraining.data in its order, as `load_examples` reads them for sft; rows
    that have a text and no prompt as texts.

    Every token of a text is learned from, but the first where the tokenizer has none to begin a
    sequence with; an end-of-sequence token follows the last.

    Raises:
        DataError: the data or a row of it is not usable; names place and reason.
    """
    fields = read_rows(Path(path), required=()).fields
    if "text" not in fields or "prompt" in fields:
        return load_examples(
            path, tokenizer, "sft", token_budget=token_budget, max_length=max_length
        )
    rows = read_rows(Path(path), required=("text",))
    examples = _texts(rows, Path(path), tokenizer)
    examples.check_lengths(rows, token_budget, max_length)
    return examples


def _texts(rows: Rows, path: Path, tokenizer: PreTrainedTokenizerBase) -> Examples:
    first, keys, examples = rows[0]["text"], RowKeys(rows.fields, "text"), Examples()
    encoder = Encoder(tokenizer, first if isinstance(first, str) else "")
    ending = Ending(path, tokenizer, is_chat=False)

    def add(ids: list[int]) -> None:
        if not ids:
            raise DataError("the tokenizer makes no token of the text")
        begin, *rest = ending(encoder.with_prefix(ids))
        if not rest:
            raise DataError("the text is the end-of-sequence token alone: nothing is predicted")
        examples.append([begin], [rest], [], [])

    for start, chunk in rows.chunks():
        rows.each(start, chunk, keys.append)
        ids = rows.all(start, [row["text"] for row in chunk], encoder)
        rows.each(start, ids, add)
    examples.keys = keys.tensor()
    return examples
