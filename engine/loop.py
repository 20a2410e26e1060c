"""What training loops share: when something is due, how a run is stopped, and what it leaves."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from warpo.engine import checkpoint
from warpo.engine.config import Checkpoint
from warpo.engine.errors import CheckpointError, TrainingError, WarpoError
from warpo.engine.metrics import RunLog, Settings, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trained(Protocol):
    """The parts of a run that trains a language or reward model.

    Attributes:
        step: steps whose update is complete.
        whole: False while the weights are between two steps, or not proven to be those of `step`.
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


class Schedule:
    """When a run is saved.

    Attributes:
        saved: step of the newest checkpoint; None before the first.
    """

    def __init__(self, settings: Checkpoint, resumed: checkpoint.Saved | None) -> None:
        self.saved = None if resumed is None else resumed.step
        self.keep = settings.keep
        self._every_steps, self._seconds = settings.every_steps, settings.every_minutes * 60
        self._since = time.monotonic()

    def is_due(self, step: int, last: int) -> bool:
        return due(step, self._every_steps, last) or self.is_late

    @property
    def is_late(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last one."""
        return 0 < self._seconds <= time.monotonic() - self._since

    def done(self, step: int) -> None:
        """A checkpoint of this step is on disk."""
        self.saved, self._since = step, time.monotonic()


class SavedSettings(Settings, Protocol):
    """The root of a tree of settings."""

    @property
    def output_dir(self) -> str: ...


def save(parts: Trained, log: RunLog, config: SavedSettings, schedule: Schedule) -> None:
    """Write a checkpoint of the parts, where there is none of their step.

    Raises:
        TrainingError: a number of it is not finite.
        CheckpointError: the disk does not take it.
    """
    if schedule.saved == parts.step:
        return
    log.flush()
    with log.phase("checkpoint"):
        checkpoint.save(
            config.output_dir,
            step=parts.step,
            model=parts.model,
            tokenizer=parts.tokenizer,
            parts=parts.stateful,
            keep=schedule.keep,
            settings=plain(config),
        )
    schedule.done(parts.step)


def check_state(step: int, loss: float, grad_norm: float, output_dir: str) -> None:
    """Refuse to save weights that training cannot go on from.

    Raises:
        TrainingError: the loss by them or its gradient is not finite.
    """
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise TrainingError(
            f"step {step} is not saved, since the run has diverged: by its weights the loss is "
            f"{loss:.4g} and the gradient norm {grad_norm:.4g}. {checkpoint.last_good(output_dir)}"
        )


@contextmanager
def checkpoint_on_error(
    parts: Trained, log: RunLog, save_parts: Callable[[], None], schedule: Schedule
) -> Iterator[None]:
    """Leave a checkpoint of the last complete step, whatever ends the run, if its state is good."""
    try:
        yield
    except BaseException as error:
        if not parts.boundary:
            raise
        if not parts.whole:
            log.say(f"stopped; the weights after step {parts.step} are lost or failed their proof")
        elif not isinstance(error, CheckpointError):  # where saving failed it would again
            parts.rewind()
            try:
                save_parts()
            except WarpoError as reason:
                if str(reason) != str(error):
                    log.say(f"stopped; {reason}")
        if schedule.saved == parts.step:
            log.say(f"stopped; step {parts.step} is saved: --resume continues after it")
        elif schedule.saved is not None:
            log.say(f"--resume continues after step {schedule.saved}, the last that was saved")
        else:
            log.say("no checkpoint was saved: the same command begins the run anew")
        raise


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now."""
    return step == last or (every > 0 and step % every == 0)


@contextmanager
def signals(log: RunLog) -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and the end of the terminal wait for a moment at which nothing is lost; a
    second one does not wait.
    """
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.say("stopping as soon as nothing is lost; again to stop at once")

    previous = {}
    with suppress(ValueError):  # not in the main thread: signals are the caller's
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has a run ignore the end of its terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
