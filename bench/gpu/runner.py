"""Runs programs within limits of time, where time is scarce: one that hangs costs its limit."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from warpo.bench.gpu.results import LOG, record

# Between the signal that a program can answer and the one that it cannot.
GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One program of a run.

    Attributes:
        limit_s: seconds after which it is ended, with all that it has started.
        environment: variables beside those of the run.
        log: the file that its output is appended to.
    """

    name: str
    limit_s: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    log: str = LOG


class Runner:
    """Runs steps in a folder for results. None of them outlives it, if it is not killed itself.

    Args:
        out: exists.
        budget_s: seconds for all steps, from now on.
        tell: gets a line for each step that has ended.
    """

    def __init__(self, out: Path, budget_s: float, tell: Callable[[str], None] = print) -> None:
        self._out, self._tell = out, tell
        self._end = time.monotonic() + budget_s
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._closed = False

    def run(self, stages: Sequence[Sequence[Step]]) -> bool:
        """Run the stages in turn, and the steps of a stage side by side. One that fails stops no
        other. True if all did what they should.
        """
        good = True
        try:
            for steps in stages:
                with ThreadPoolExecutor(len(steps)) as pool:
                    futures = [pool.submit(self._step, step) for step in steps]
                    try:
                        good &= all([future.result() for future in futures])
                    except BaseException:
                        self._close()
                        raise
        finally:
            self._close()
        return good

    def _left_s(self) -> float:
        return self._end - time.monotonic()

    def _step(self, step: Step) -> bool:
        limit_s = min(step.limit_s, self._left_s())
        if limit_s <= 0:
            return self._ended(step, "not run: no time left", 0.0)
        start = time.monotonic()
        status = self._status(step, limit_s)
        return self._ended(step, status, time.monotonic() - start)

    def _status(self, step: Step, limit_s: float) -> str:
        with (self._out / step.log).open("ab") as log:
            log.write(f"=== {step.name}, at most {limit_s:.0f} s\n".encode())
            log.flush()
            try:
                process = self._start(step, log.fileno())
            except OSError as error:
                return f"failed: {error}"
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {round(limit_s, 1):g} s"
        finally:
            end(process)
        with self._lock:
            self._running.discard(process)
        return "passed" if process.returncode == 0 else f"failed: status {process.returncode}"

    def _start(self, step: Step, log: int) -> subprocess.Popen:
        """In a process group of its own, by which all that it starts is found, but not in a session
        of its own, so that who ends ours finds it.
        """
        with self._lock:
            if self._closed:
                raise OSError("the run was ended")
            process = subprocess.Popen(
                step.command,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            self._running.add(process)
        return process

    def _ended(self, step: Step, status: str, seconds: float) -> bool:
        record(self._out, "step", name=step.name, status=status, seconds=round(seconds, 1))
        left = max(0, round(self._left_s()))
        self._tell(f"{step.name:12} {seconds:6.1f} s  {status}  ({left} s left)")
        return status == "passed"

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and those of its group that are left."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
