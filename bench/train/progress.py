"""What runs, and how long is left."""

from __future__ import annotations

import contextlib
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

    def __str__(self) -> str:
        left = round(self.left_s())
        return f"{self.begun}/{len(self.seconds)}, about {left // 60}:{left % 60:02} left"


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[Callable[[str], None]]:
    """A function that is told the title of each part as it starts: a line that counts down on a
    terminal, a line for each part elsewhere.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live

        title = ""
        with Live(
            get_renderable=lambda: f"[{progress}] {title}" if title else "",
            console=Console(stderr=True, markup=False), refresh_per_second=2, transient=True,
        ):  # fmt: skip

            def tell(words: str) -> None:
                nonlocal title
                progress.begin()
                title = words

            yield tell
        return

    def line(words: str) -> None:
        progress.begin()
        print(f"[{progress}] {words}", file=sys.stderr, flush=True)

    yield line
