"""Output of a run: a live line, a table row per step, metrics.jsonl and TensorBoard.

`RunLog` times the phases of a step, and each is an NVTX range where the package `nvtx` is there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.utils.tensorboard import SummaryWriter

from warpo.engine.errors import CheckpointError
from warpo.engine.redact import redact
from warpo.engine.run import samples
from warpo.engine.run.columns import COLUMNS, Column, Table
from warpo.engine.run.device import finish_device_work
from warpo.engine.run.terminal import OutputConsole
from warpo.engine.run.watch import Watch
from warpo.engine.types import ReportProgress


class Settings(Protocol):
    """The root of a tree of settings, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def plain(settings: Settings) -> dict[str, Any]:
    """A tree of settings as YAML and JSON can hold it: without credentials of URLs, and without
    `resume`, which a run has not from its beginning.
    """
    tree: dict[str, Any] = redact(json.loads(json.dumps(dataclasses.asdict(settings))))
    return {name: value for name, value in tree.items() if name != "resume"}


class Log(Protocol):
    """Interface through which the parts of a run report, time and count.

    Attributes:
        is_watched: True if somebody may look on: the output is a terminal.
    """

    @property
    def is_watched(self) -> bool: ...
    def phase(self, name: str) -> AbstractContextManager[ReportProgress]: ...
    def start_step(self) -> None: ...
    def count(self, metric: str, number: int) -> None: ...
    def say(self, text: str) -> None: ...
    def say_once(self, topic: str, text: str) -> None: ...
    def show(self, title: str, prompt: str, completions: Sequence[tuple[float, str]]) -> None: ...
    def is_evaluated(self, step: int) -> bool: ...
    def add(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]: ...
    def flush(self) -> None: ...


class NoLog:
    """Keeps and shows nothing."""

    is_watched = False

    @contextmanager
    def phase(self, name: str) -> Iterator[ReportProgress]:
        yield lambda done, total: None

    def start_step(self) -> None:
        pass

    def count(self, metric: str, number: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def say_once(self, topic: str, text: str) -> None:
        pass

    def show(self, title: str, prompt: str, completions: Sequence[tuple[float, str]]) -> None:
        pass

    def is_evaluated(self, step: int) -> bool:
        return False

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return dict(metrics)

    def flush(self) -> None:
        pass


class RunLog:
    """Output of one run. Use it as a context manager: leaving it closes files and the live line.

    Args:
        output_dir: gets metrics.jsonl, tensorboard/ and config.yaml.
        config: written to config.yaml, without credentials of URLs.
        columns: columns of the table.
        shown_every: steps from one row of the table to the next; evaluations are all in it.
        resume_step: step that a resumed run has reached; rows of later steps are dropped, so that
            metrics.jsonl has one row per step, and settings that have changed since are kept as
            config-step-<step>.yaml. None: the run begins, and rows of one that saved no checkpoint
            are kept as metrics.jsonl.old.
        console: destination of the table; by default standard output.
    """

    def __init__(
        self,
        output_dir: str | Path,
        config: Settings,
        *,
        columns: Sequence[Column] = COLUMNS,
        shown_every: int = 1,
        resume_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        directory = Path(output_dir)
        self._path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self._evaluated: set[int] = set()
        self._watch = Watch()
        if resume_step is not None:
            for row in _keep_rows(self._path, resume_step):
                self._watch.take(_numbers(row))
                if any(name.startswith("eval/") for name in row):
                    self._evaluated.add(row["step"])
        elif self._path.exists():
            os.replace(self._path, self._path.with_suffix(".jsonl.old"))
        _write_settings(directory, config, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        # TensorBoard hides what an earlier process wrote of the steps from here on
        self._board = SummaryWriter(
            str(directory / "tensorboard"), purge_step=0 if resume_step is None else resume_step + 1
        )
        self._console = console or OutputConsole()
        self._table = Table(self._console, columns)
        self._shown_every = shown_every
        self._live = _live_line(self._console)
        self._seconds: dict[str, float] = {}
        self._said: set[str] = set()
        self._counts: dict[str, float] = {}
        self._step_start: float | None = None

    def __enter__(self) -> RunLog:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        self._board.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[ReportProgress]:
        """Time a phase of the step and show it; yields a function to report (done, total).

        Its seconds join the metrics of the next row as perf/<name>_s, added up if it comes again.
        What a GPU was given to do before it is not in them, and what the phase gave it is.
        """
        finish_device_work()
        start = time.perf_counter()
        if self._step_start is None:
            self._step_start = start
        task = self._live.add_task(name, total=None, counts="") if self._live else None

        def report(done: int, total: int) -> None:
            if self._live and task is not None:
                self._live.update(task, completed=done, total=total, counts=f"{done}/{total}")

        try:
            with _nvtx_range(name):
                yield report
                finish_device_work()
        finally:
            seconds = time.perf_counter() - start
            metric = f"perf/{name.replace(' ', '_')}_s"
            self._seconds[metric] = self._seconds.get(metric, 0.0) + seconds
            if self._live and task is not None:
                self._live.remove_task(task)

    def start_step(self) -> None:
        """Start the clock of perf/step_s, which leaves out what came before, such as loading."""
        self._step_start = time.perf_counter()

    def count(self, metric: str, number: int) -> None:
        """Add to a metric of the next row."""
        self._counts[metric] = self._counts.get(metric, 0.0) + number

    def say(self, text: str) -> None:
        """A line above the live line, which stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_once(self, topic: str, text: str) -> None:
        """The same, the first time that something is said of the topic."""
        if topic not in self._said:
            self._said.add(topic)
            self.say(text)

    @property
    def is_watched(self) -> bool:
        return self._console.is_terminal

    def show(self, title: str, prompt: str, completions: Sequence[tuple[float, str]]) -> None:
        """The end of a prompt and completions of it with their rewards, in a few lines."""
        console = self._console
        for line in samples.describe(title, prompt, completions, console.width, console.encoding):
            self.say(line)

    def is_evaluated(self, step: int) -> bool:
        """True if the row of a step of an earlier process has the metrics of its evaluation."""
        return step in self._evaluated

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Put metrics into the last row, which is that of `step`; without it, write one."""
        rows = read_rows(self._path)
        if not rows or rows[-1]["step"] != step:
            self.write(step, metrics)
            return
        values = {name: float(value) for name, value in metrics.items()} | self._counts
        self._seconds, self._counts, self._step_start = {}, {}, None
        self._file.close()
        _write_rows(self._path, [*rows[:-1], rows[-1] | _finite(values)])
        self._file = self._path.open("a", encoding="utf-8")
        self._show(step, {k: v for k, v in rows[-1].items() if v is not None} | values)

    def flush(self) -> None:
        """Bring the rows to the disk: a checkpoint must not be newer than they are."""
        os.fsync(self._file.fileno())

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Keep and show the metrics of a step, with the seconds of its phases.

        Adds perf/step_s, the seconds since `start_step` or else since the first phase after the
        last row, and where perf/tokens is given, perf/tokens_per_s. A value that is not finite
        becomes null in the file, as JSON has no NaN.

        Returns:
            What was written.
        """
        now = time.perf_counter()
        row = {name: float(value) for name, value in metrics.items()}
        row |= self._seconds | self._counts
        row["perf/step_s"] = now - (self._step_start if self._step_start is not None else now)
        if "perf/tokens" in row and row["perf/step_s"] > 0:
            row["perf/tokens_per_s"] = row["perf/tokens"] / row["perf/step_s"]
        self._seconds, self._counts, self._step_start = {}, {}, None
        written = {"step": step} | _finite(row)
        try:
            self._file.write(json.dumps(written) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written: {error.strerror}; make room on its disk and "
                "resume the run"
            ) from None
        self._show(step, row)
        for warning in self._watch.warnings({**row, "step": step}):
            self.say(warning)
        return written

    def _show(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        if step % self._shown_every == 0 or any(name.startswith("eval/") for name in row):
            for line in self._table.lines({**row, "step": step}):
                self.say(line)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of the file, whose nulls are values that were not finite."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _live_line(console: Console) -> Progress | None:
    """None where nobody watches: a file or a pipe gets rows and no control codes."""
    if not console.is_terminal:
        return None
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


def _nvtx_range(name: str) -> Any:
    if importlib.util.find_spec("nvtx") is None:
        return nullcontext()
    import nvtx

    return nvtx.annotate(name, domain="warpo")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a crash cut short.

    Raises:
        CheckpointError: a line before the last is not JSON, or a row has no step.
    """
    rows = []
    lines = Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path}:{number}: not JSON: {error}") from None
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise CheckpointError(f"{path}:{number}: not a row of metrics: it has no step")
        rows.append(row)
    return rows


def _keep_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after a step; the others."""
    rows = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
    _write_rows(path, rows)
    return rows


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    kept = path.with_suffix(".tmp")
    with kept.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(kept, path)


def _write_settings(directory: Path, config: Settings, resume_step: int | None) -> None:
    path, text = directory / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False)
    if resume_step is not None and path.exists() and path.read_text(encoding="utf-8") != text:
        before = directory / f"config-step-{resume_step:06d}.yaml"
        # the first that went on from this step is what led to it
        if not before.exists():
            os.replace(path, before)
    path.write_text(text, encoding="utf-8")
