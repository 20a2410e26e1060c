"""Two processes as torchrun starts them, for tests of what ranks do together."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = """
import importlib, pickle, sys
module, name, folder, arguments = sys.argv[1:]
work = getattr(importlib.import_module(module), name)
result = work(*pickle.loads(bytes.fromhex(arguments)))
import os
open(f"{folder}/result-{os.environ['RANK']}", "wb").write(pickle.dumps(result))
"""


def start_ranks(
    command: list[str], folder: Path, size: int = 2, **variables: str
) -> list[subprocess.Popen[str]]:
    """Start `command` as ranks 0 to size - 1, in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(
    processes: list[subprocess.Popen[str]], timeout: float = 120
) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    try:
        written = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, written, strict=True)]


def on_ranks(work: Any, folder: Path, *arguments: Any, size: int = 2) -> list[Any]:
    """The results of work(*arguments), a function of a module, on each rank."""
    data = pickle.dumps(arguments).hex()
    command = [sys.executable, "-c", CODE, work.__module__, work.__name__, str(folder), data]
    for status, _, errors in finish(start_ranks(command, folder, size)):
        assert status == 0, errors
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]
