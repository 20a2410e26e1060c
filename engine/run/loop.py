"""Shared parts of training loops: a run with its log, how it is stopped, and its checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from warpo.engine.config.sections import CheckpointSettings
from warpo.engine.errors import CheckpointError, TrainingError, WarpoError
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.engine.run import checkpoint
from warpo.engine.run.checkpoint import Saved, Stateful, Weights
from warpo.engine.run.columns import COLUMNS, Column
from warpo.engine.run.log import Log, NoLog, RunLog, plain
from warpo.engine.run.resume import RunSettings, claim, tell
from warpo.engine.types import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """State that all parts of a run share.

    Attributes:
        stop: returns True once Ctrl-C, SIGTERM or the end of the terminal asked for it.
        saved: the checkpoint to resume from; None where the run begins.
    """

    log: Log
    stop: Callable[[], bool] = lambda: False
    saved: Saved | None = None
    ranks: Ranks = ONE_RANK

    def say_resumed(self) -> None:
        """Tell where the run goes on, once all of it is loaded."""
        if self.saved is not None:
            self.log.say(f"resumed after step {self.saved.step} from {self.saved.path}")

    def raise_if_stopped(self) -> None:
        """Raise KeyboardInterrupt where a stop was asked for."""
        if self.stop():
            raise KeyboardInterrupt


@contextmanager
def open_run(
    config: RunSettings,
    ranks: Ranks = ONE_RANK,
    settled: str = "",
    *,
    columns: Sequence[Column] = COLUMNS,
    shown_every: int = 1,
) -> Iterator[Run]:
    """Hold output_dir, open the log, and let signals wait for a moment at which nothing is lost.

    Args:
        settled: line on the settings that were left to the machine.

    Raises:
        ConfigError, CheckpointError: see `claim`.
    """
    with (
        claim(config) as saved,
        _open_log(config, ranks, saved, columns, shown_every) as log,
        signals(log) as asked,
    ):
        if settled:
            log.say(settled)
        tell(config, saved, log)
        yield Run(log=log, stop=lambda: ranks.any(asked()), saved=saved, ranks=ranks)


def _open_log(
    config: RunSettings,
    ranks: Ranks,
    saved: Saved | None,
    columns: Sequence[Column],
    shown_every: int,
) -> AbstractContextManager[Log]:
    if not ranks.is_main:
        return nullcontext(NoLog())
    return RunLog(
        config.output_dir,
        config,
        columns=columns,
        shown_every=shown_every,
        resume_step=saved.step if saved else None,
    )


class Progress:
    """Progress of a run, and what a step that fails takes back.

    Attributes:
        step: steps whose update is complete.
        whole: False while the weights are between two steps, or not proven to be those of `step`.
    """

    def __init__(self) -> None:
        self.step, self.whole = 0, True
        self._advanced: dict[str, Stateful] = {}
        self._boundary: dict[str, Any] | None = None

    def track(self, **advanced: Stateful) -> None:
        """Take back the state of these too: sampling and estimating advance them before a step is
        complete.
        """
        self._advanced |= advanced

    @property
    def is_prepared(self) -> bool:
        """True once there is a state to go back to."""
        return self._boundary is not None

    def mark(self) -> None:
        """Take the state of what is advanced for that after `step`."""
        self._boundary = {name: part.state_dict() for name, part in self._advanced.items()}

    def complete(self) -> None:
        """Count a step, all of whose parts are updated."""
        self.step, self.whole = self.step + 1, True
        self.mark()

    def rewind(self) -> None:
        """Go back to the state after `step`."""
        assert self._boundary is not None
        for name, state in self._boundary.items():
            self._advanced[name].load_state_dict(state)


class SavedSettings(RunSettings, Protocol):
    """The root of a tree of settings with a section for checkpoints."""

    @property
    def checkpoint(self) -> CheckpointSettings: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """Contents of a checkpoint.

    Attributes:
        model, tokenizer: None where the parts hold all there is.
        parts: objects whose state is kept, by name.
        check: raises a TrainingError where the state is of no use any more.
    """

    parts: Mapping[str, Stateful]
    check: Callable[[], None]
    model: Weights | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


class Checkpoints:
    """The checkpoints of a run: when one is due, and as a context manager one of the last complete
    step, whatever ends the run.

    Attributes:
        saved: step of the newest; None before the first.
    """

    def __init__(
        self, config: SavedSettings, run: Run, progress: Progress, contents: Contents
    ) -> None:
        self.saved = None if run.saved is None else run.saved.step
        self._config, self._run, self._progress, self._contents = config, run, progress, contents
        self._since = time.monotonic()

    def load(self) -> None:
        """Go on from the checkpoint that the run resumes from, where there is one."""
        saved = self._run.saved
        if saved is not None:
            model, parts = self._contents.model, self._contents.parts
            self._progress.step = checkpoint.load(saved, model=model, parts=parts)

    def is_due(self) -> bool:
        """True after the last step and wherever checkpoint.every_steps or every_minutes say."""
        every = self._config.checkpoint.every_steps
        return due(self._progress.step, every, self._config.steps) or self.is_late()

    def is_late(self) -> bool:
        """True if checkpoint.every_minutes have passed since the last one."""
        seconds = self._config.checkpoint.every_minutes * 60
        return 0 < seconds <= time.monotonic() - self._since

    def save(self) -> None:
        """Write a checkpoint, where there is none of this step.

        Raises:
            TrainingError: a number of it is not finite.
            CheckpointError: the disk does not take it.
        """
        step, contents = self._progress.step, self._contents
        if self.saved == step:
            return
        contents.check()
        self._run.log.flush()
        with self._run.log.phase("checkpoint"):
            if self._run.ranks.is_main:
                checkpoint.save(
                    self._config.output_dir,
                    step=step,
                    model=contents.model,
                    tokenizer=contents.tokenizer,
                    parts=contents.parts,
                    keep=self._config.checkpoint.keep,
                    settings=plain(self._config),
                )
            self._run.ranks.barrier()
        self.saved, self._since = step, time.monotonic()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._progress.is_prepared:
            self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """Save the last complete step, if its state is good, and say what there is to resume."""
        progress, say = self._progress, self._run.log.say
        if not progress.whole:
            say(f"stopped; the weights after step {progress.step} are lost or failed their proof")
        elif not isinstance(error, CheckpointError):  # where saving failed it would again
            progress.rewind()
            try:
                self.save()
            except WarpoError as reason:
                if str(reason) != str(error):
                    say(f"stopped; {reason}")
        if self.saved == progress.step:
            say(f"stopped; step {progress.step} is saved: --resume continues after it")
        elif self.saved is not None:
            say(f"--resume continues after step {self.saved}, the last that was saved")
        else:
            say("no checkpoint was saved: the same command begins the run anew")


def evaluate_before_first_step(log: Log, step: int, evaluate: Callable[[], Metrics]) -> None:
    """Put an evaluation into the row of `step`, where it has none: a run may have ended within the
    evaluation after its checkpoint.
    """
    if not log.is_evaluated(step):
        log.start_step()
        if evaluated := evaluate():
            log.add(step, evaluated)


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


def due(step: int, every: int, last: int) -> bool:
    """True if a periodic action is due after this step: every N steps, and after the last."""
    return step == last or (every > 0 and step % every == 0)


@contextmanager
def signals(log: Log) -> Iterator[Callable[[], bool]]:
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
