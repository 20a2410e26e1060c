"""What training loops share: when something is due, how a run is stopped, and what it leaves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from warpo.engine import checkpoint
from warpo.engine.metrics import RunLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trained(Protocol):
    """The parts of a run that trains a language or reward model.

    Attributes:
        step: steps whose update is complete.
        whole: False while the weights are between two steps.
        boundary: what `rewind` goes back to; empty before the run is prepared.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    step: int
    whole: bool
    boundary: dict[str, Any]

    @property
    def stateful(self) -> dict[str, checkpoint.Stateful]: ...

    def rewind(self) -> None: ...


def save(parts: Trained, log: RunLog, output_dir: str, keep: int) -> None:
    """Write a checkpoint of the parts."""
    with log.phase("checkpoint"):
        checkpoint.save(
            output_dir,
            step=parts.step,
            model=parts.model,
            tokenizer=parts.tokenizer,
            parts=parts.stateful,
            keep=keep,
        )


@contextmanager
def checkpoint_on_error(
    parts: Trained, log: RunLog, save_parts: Callable[[], None]
) -> Iterator[None]:
    """Leave a checkpoint of the last complete step, whatever ends the run."""
    try:
        yield
    except BaseException:
        if parts.whole and parts.boundary:
            parts.rewind()
            save_parts()
            log.say(f"stopped; step {parts.step} is saved: --resume continues after it")
        elif parts.boundary:
            log.say("stopped within an update; --resume continues from the newest checkpoint")
        raise


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now."""
    return step == last or (every > 0 and step % every == 0)


@contextmanager
def signals(log: RunLog) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for a moment at which nothing is lost; a second one does not wait."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.say("stopping as soon as nothing is lost; again to stop at once")

    previous = {}
    with suppress(ValueError):  # not in the main thread: signals are the caller's
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_if(stop: Callable[[], bool]) -> None:
    """Raise KeyboardInterrupt where a stop was asked for."""
    if stop():
        raise KeyboardInterrupt
