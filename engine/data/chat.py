"""Chat templates: what they make of messages, and the token that ends a turn.

A template is a program of whoever made the model. transformers runs it in a sandbox; here it also
gets limits of time and memory, and whatever it raises becomes one line.
"""

from __future__ import annotations

import itertools
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from warpo.engine.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of one prompt. Templates take some 20 microseconds and kilobytes.
RENDER_S, RENDER_BYTES, RENDER_CHARACTERS = 10.0, 1 << 30, 1 << 24
_QUESTION, _ANSWER = "warpo asks", "warpo answers"


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of the messages, followed by the header of the assistant's turn.

    Raises:
        DataError: the tokenizer has no template, or it fails.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the prompt is a list of chat messages, but the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has no chat template: "
            "write the prompts as text, or use a model with a template"
        )
    try:
        with _limits():
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except _TooLong:
        why = f"it takes longer than {RENDER_S:g} s"
    except MemoryError:
        why = f"it takes more than {RENDER_BYTES >> 20} MiB"
    except Exception as error:  # a template raises what it likes: KeyError, TypeError, ...
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        why = name + one_line(error)
    else:
        if len(text) <= RENDER_CHARACTERS:
            return str(text)
        why = f"it makes {len(text)} characters of them, more than {RENDER_CHARACTERS}"
    raise DataError(f"the chat template refuses the messages: {why}")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the template writes right after what an assistant said: <|im_end|>,
    <end_of_turn>, or two of Cohere's. Sampling ends with the last of them.

    Empty where there is no template, or it writes none that the tokenizer has as a token.

    Raises:
        DataError: the template does not render a question and an answer.
    """
    if tokenizer.chat_template is None:
        return []
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    text = render(turns, tokenizer, add_generation_prompt=False)
    if _ANSWER not in text or _QUESTION not in text:
        raise DataError(
            "the chat template leaves out what messages say as text: use a model of text, or write "
            "the prompts as text"
        )
    after = text.rpartition(_ANSWER)[2]
    marks = {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        # some tokenizers add runs of spaces too
        if added.content.strip()
    }
    marks -= {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    found = itertools.dropwhile(lambda token: token not in marks, ids)
    return list(itertools.takewhile(lambda token: token in marks, found))


class _TooLong(BaseException):
    """Not an Exception: a template engine may catch those."""


@contextmanager
def _limits() -> Iterator[None]:
    """RENDER_S of processor time, where signals can be had, and RENDER_BYTES more of memory."""

    def expire(signum: int, frame: object) -> None:
        raise _TooLong

    in_main = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + RENDER_BYTES
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    previous = signal.signal(signal.SIGVTALRM, expire) if in_main else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S)
        yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
