"""What every training loop shares: when something is due, and how a run is stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from warpo.engine.metrics import RunLog


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
