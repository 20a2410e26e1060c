"""Progress: the name of the running part, and an estimate of the time left."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence


class Progress:
    """Parts of known share of the work, done one after the other.

    Args:
        seconds: what each part is expected to take. Only their ratios count once one is done.
    """

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = list(seconds)
        self.begun = 0
        self.start = self.part_start = time.perf_counter()

    def begin(self) -> None:
        """The next part starts, and the one before it is done."""
        self.begun, self.part_start = self.begun + 1, time.perf_counter()

    def left_s(self) -> float:
        """Seconds until the end, at the speed of the parts that are done."""
        done = sum(self.seconds[: max(0, self.begun - 1)])
        pace = (self.part_start - self.start) / done if done else 1.0
        left = (sum(self.seconds) - done) * pace - (time.perf_counter() - self.part_start)
        return max(left, pace * sum(self.seconds[self.begun :]))

    def share_done(self) -> float:
        """0 to 1: of the parts that are done, by what they were expected to take."""
        return sum(self.seconds[: max(0, self.begun - 1)]) / sum(self.seconds)

    def __str__(self) -> str:
        left = round(self.left_s())
        return f"{self.begun}/{len(self.seconds)}, about {left // 60}:{left % 60:02} left"


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[Callable[[str], None]]:
    """A function that is told the title of each part as it starts: a bar that counts down on a
    terminal, a line for each part elsewhere or without rich.
    """
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        with _bar(progress) as tell:
            yield tell
        return

    def line(title: str) -> None:
        progress.begin()
        print(f"[{progress}] {title}", file=sys.stderr, flush=True)

    yield line


@contextlib.contextmanager
def _bar(progress: Progress) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    title = ""

    def drawn() -> Table:
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(1.0, progress.share_done(), width=24), f"{progress}", title)
        return row

    console = Console(stderr=True, markup=False)
    with Live(get_renderable=drawn, console=console, refresh_per_second=2, transient=True):

        def tell(words: str) -> None:
            nonlocal title
            progress.begin()
            title = words

        yield tell
