"""JSONL data sets: the whole file is checked and tokenised before a model is loaded.

A line is {"prompt": text or chat messages, further fields}. Chat messages go through the
tokenizer's chat template, with the header of the assistant's turn appended. Text is continued as
it stands: it gets the special tokens that the tokenizer puts before any text (a BOS where the model
was trained with one), and nothing after it.
"""

from __future__ import annotations

import difflib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import jinja2
import numpy as np

from warpo.engine.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as the model reads it, and its line of the file for the reward function."""

    token_ids: list[int]
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Prompt and completion for supervised fine-tuning; the loss is on what follows the prompt."""

    token_ids: list[int]
    num_prompt_tokens: int


def load_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[Prompt]:
    """The prompts of a JSONL file, in its order.

    Raises:
        DataError: the file or a line of it is not usable; names file, line, reason.
    """
    rows = _read_rows(Path(path), required=("prompt",))
    if "completions" in rows[0][1]:
        raise DataError(
            f"{path}:{rows[0][0]}: rename the field 'completions': "
            "reward functions get the sampled completions under that name"
        )
    ids = _prompt_ids(Path(path), rows, tokenizer)
    _check_lengths(
        Path(path),
        rows,
        [len(prompt) for prompt in ids],
        max_prompt_tokens,
        "prompt",
        "rollout.max_model_len - rollout.max_new_tokens",
    )
    return [
        Prompt(token_ids=prompt, fields=row) for prompt, (_, row) in zip(ids, rows, strict=True)
    ]


def load_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Example]:
    """Prompt and completion pairs of a JSONL file; the end-of-sequence token follows each.

    Raises:
        DataError: the file or a line of it is not usable; names file, line, reason.
    """
    rows = _read_rows(Path(path), required=("prompt", "completion"))
    for number, row in rows:
        _check_text(f"{path}:{number}: completion", row["completion"])
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no end-of-sequence token to end completions")
    prompts = _prompt_ids(Path(path), rows, tokenizer)
    completions = tokenizer([row["completion"] for _, row in rows], add_special_tokens=False)
    examples = [
        Example(
            token_ids=[*prompt, *completion, tokenizer.eos_token_id],
            num_prompt_tokens=len(prompt),
        )
        for prompt, completion in zip(prompts, completions["input_ids"], strict=True)
    ]
    lengths = [len(example.token_ids) for example in examples]
    _check_lengths(
        Path(path), rows, lengths, max_tokens, "prompt and completion", "rollout.max_model_len"
    )
    return examples


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


def _read_rows(path: Path, required: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    rows = [
        (number, _parse_line(f"{path}:{number}", line))
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: the file is empty, wanted one JSON object a line")
    first_number, first = rows[0]
    for number, row in rows:
        _check_fields(f"{path}:{number}", row, required, first, first_number)
    return rows


def _parse_line(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 at byte {error.start + 1} of the line: save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: wanted a JSON object, got {type(row).__name__}: {row!r:.60}")
    return row


def _check_fields(
    place: str, row: dict, required: Sequence[str], first: dict, first_number: int
) -> None:
    for name in required:
        if name not in row:
            near = difflib.get_close_matches(name, row, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(row) or 'none'}"
            raise DataError(f"{place}: the field {name!r} is missing: {hint}")
    for name in first:
        if name not in row:
            raise DataError(f"{place}: the field {name!r} is missing, line {first_number} has it")
    for name in row:
        if name not in first:
            raise DataError(f"{place}: the field {name!r} is new, line {first_number} lacks it")
    if isinstance(row["prompt"], list) != isinstance(first["prompt"], list):
        raise DataError(
            f"{place}: text and chat prompts are mixed: line {first_number} is of the other kind"
        )
    _check_prompt(f"{place}: prompt", row["prompt"])


def _check_prompt(place: str, prompt: Any) -> None:
    if not isinstance(prompt, list):
        _check_text(place, prompt, "text or a list of chat messages")
        return
    if not prompt:
        raise DataError(f"{place} is empty, wanted at least one chat message")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                f'{place}: message {i} must be {{"role": ..., "content": ...}}, got {message!r:.60}'
            )
        _check_text(f"{place}: role of message {i}", message["role"])
        _check_text(f"{place}: content of message {i}", message["content"])
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{place} ends with an assistant message: nothing is left to answer")


def _check_text(place: str, value: Any, wanted: str = "text") -> None:
    if not isinstance(value, str):
        raise DataError(f"{place} must be {wanted}, got {type(value).__name__}: {value!r:.60}")
    if not value:
        raise DataError(f"{place} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half a surrogate pair at character {error.start + 1}: "
            "it is not valid Unicode"
        ) from None


def _prompt_ids(
    path: Path, rows: Sequence[tuple[int, dict]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    if isinstance(rows[0][1]["prompt"], list):
        texts = [_render(f"{path}:{number}", row["prompt"], tokenizer) for number, row in rows]
        # The template has written the special tokens already.
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer([row["prompt"] for _, row in rows])["input_ids"]
    for (number, _), prompt in zip(rows, ids, strict=True):
        if not prompt:
            raise DataError(f"{path}:{number}: the tokenizer makes no token of the prompt")
        if prompt[-1] == tokenizer.eos_token_id and not isinstance(rows[0][1]["prompt"], list):
            raise DataError(
                f"{path}:{number}: the prompt ends with the end-of-sequence token: remove it from "
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
    path: Path, rows: Sequence[tuple], lengths: list[int], limit: int, what: str, setting: str
) -> None:
    too_long = [(row[0], n) for row, n in zip(rows, lengths, strict=True) if n > limit]
    if too_long:
        number, length = too_long[0]
        others = f" ({len(too_long) - 1} more lines are too long)" if len(too_long) > 1 else ""
        raise DataError(
            f"{path}:{number}: {what} of {length} tokens, at most {limit} fit ({setting}){others}: "
            f"raise rollout.max_model_len by {max(lengths) - limit}, or shorten the text"
        )
