"""A folder that is written whole or not at all, and what to say where the disk does not take it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from warpo.engine.errors import CheckpointError, one_line


@contextmanager
def folder(final: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write to, which is flushed and gets its name at the end. Where that fails,
    nothing of it stays.
    """
    draft = final.parent / f".{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in [*final.parent.glob(".step-*"), *final.parent.glob(".old-*"), draft]:
            shutil.rmtree(leftover, ignore_errors=True)
        if shutil.disk_usage(final.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        draft.mkdir()
        yield draft
        _flush(draft)
        if final.exists():
            os.rename(final, final.parent / f".old-{final.name}")
        os.rename(draft, final)
        _flush_directory(final.parent)
        shutil.rmtree(final.parent / f".old-{final.name}", ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(_disk_error(final, num_bytes, error)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _disk_error(final: Path, num_bytes: int, error: Exception) -> str:
    """Describe what the disk is short of, and what is left."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    reason = os.strerror(number) if number else one_line(error)
    place = final.absolute()
    while not place.exists() or not place.is_mount() and place != place.parent:
        place = place.parent
    cure = "make it writable or choose another output_dir"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = _size(shutil.disk_usage(place).free)
        cure = (
            f"it needs {_size(num_bytes)}, and the disk mounted at {place} has {free} free: make "
            "room or choose another output_dir"
        )
    older = [path.name for path in final.parent.glob("step-*") if path != final]
    newest = max(older, key=lambda name: (len(name), name), default="none")
    return f"{final} cannot be written: {reason}; {cure}. Newest that is complete: {newest}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


class _Sink:
    """A file for torch.save, which loses the reason why a write fails."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_state(state: Any, file: IO[bytes]) -> None:
    """torch.save, with an OSError where the disk does not take it."""
    sink = _Sink(file)
    try:
        torch.save(state, sink)  # type: ignore[arg-type]  # it needs these two methods
    except RuntimeError:
        if sink.error is None:
            raise
        raise sink.error from None


def _flush(directory: Path) -> None:
    for entry in directory.iterdir():
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
