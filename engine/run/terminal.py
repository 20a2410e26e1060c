"""Terminal output: it survives its reader, and whatever failed gets one line."""

from __future__ import annotations

import errno
import os
import select
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

from warpo.engine.errors import WarpoError
from warpo.engine.redact import redact

_LONGEST_MESSAGE = 300  # characters of a message that is not ours
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class OutputConsole(Console):
    """A console on which a run goes on where its reader has gone: `warpo train ... | head`, a
    terminal that was closed.
    """

    @property
    def file(self) -> IO[str]:
        """Standard output, or what was given in its place."""
        return cast(IO[str], _Lasting(super().file))

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new


class _Lasting:
    """A stream that takes what nothing reads any more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard_output()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_output()


def discard_output() -> None:
    """Let standard output go nowhere, as nothing reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def exit_status(error: BaseException, output_dir: Callable[[], str | None]) -> int:
    """The exit status of a command that failed, after a line about it on standard error.

    A WarpoError is its message. Anything else is said with its place, and its traceback goes to
    output_dir/traceback.txt, or to a temporary file where there is no output_dir yet.

    Returns:
        1 after a failure, 130 after an interrupt, 0 where nobody reads the output any more.
    """
    if isinstance(error, WarpoError):
        print(f"warpo: {error}", file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt):
        print("warpo: interrupted", file=sys.stderr)
        return 130
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
        discard_output()
        return 0
    kept = _keep_traceback(error, output_dir)
    print(f"warpo: {redact(describe(error))}; traceback in {kept}", file=sys.stderr)
    return 1


def describe(error: Exception) -> str:
    """Describe in a line what failed and where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0][:_LONGEST_MESSAGE] if lines else "no message"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return _describe_full_disk(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror} ({_place(error)})"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of memory in {_place(error)}: {message}; `warpo check CONFIG.yaml --plan-only` "
            "tells what each phase of a step takes"
        )
    return f"{type(error).__name__}: {message} ({_place(error)})"


def _describe_full_disk(error: OSError) -> str:
    if error.filename is None:
        return f"{error.strerror} ({_place(error)})"
    path = Path(os.fsdecode(error.filename)).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free / 2**20
    return f"{path}: {error.strerror}, {free:.1f} MiB are free on the disk of {folder}"


def _place(error: Exception) -> str:
    """The innermost line of warpo that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).parents[2]
    packages = [root / name for name in ("engine", "kernels", "bench")]
    own = [
        frame
        for frame in frames
        if any(Path(frame.filename).is_relative_to(package) for package in packages)
    ]
    frame = (own or frames)[-1]
    name = Path(frame.filename)
    shown = name.relative_to(root) if own else name
    return f"{shown}:{frame.lineno} in {frame.name}"


def _keep_traceback(error: Exception, output_dir: Callable[[], str | None]) -> Path:
    text = redact("".join(traceback.format_exception(error)))
    try:
        folder = output_dir()
        if folder:
            path = Path(folder).expanduser() / "traceback.txt"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return path
    except (OSError, WarpoError, ValueError):
        pass
    descriptor, name = tempfile.mkstemp(prefix="warpo-traceback-", suffix=".txt")
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return Path(name)


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
