"""The task and the model where the examples start, made once for all workers."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.runs import prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of that name with what `prepare` makes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    made, done = shared / "examples", shared / "examples.done"
    with (shared / "examples.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            made.mkdir()
            prepare(made)
            done.touch()

    def copy(name: str) -> Path:
        return shutil.copytree(made, tmp_path_factory.mktemp(name) / "folder", symlinks=True)

    return copy
