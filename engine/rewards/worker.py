"""A process of its own for what may hang or crash: it can be killed with all that it started.

Nothing heavy is imported here, nor in function.py, math.py and scores.py: workers import them to
start.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

# Importing torch and a verifier on a loaded machine takes tens of seconds.
START_DEADLINE_S = 180.0


class Worker:
    """A started process that runs `serve` on the other end of `connection`."""

    def __init__(self, serve: Callable[[Connection], None], name: str) -> None:
        # vLLM changes the default start method; a forked child would share its CUDA context.
        context = multiprocessing.get_context("spawn")
        self.connection, remote = context.Pipe()
        # Not a daemon: those may not start processes, and verifiers do.
        self._process = context.Process(target=_lead, args=(serve, remote), name=name)
        # Before multiprocessing's own exit handler, which would wait for the worker.
        atexit.register(self.close)
        self._process.start()
        remote.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """End the process and what it started, without waiting: whoever reads it sees its end."""
        try:
            # The worker leads its own group, so what it started goes with it.
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()

    def close(self) -> None:
        """Kill the process and reap it."""
        atexit.unregister(self.close)
        self.kill()
        self._process.join()
        self._process.close()
        self.connection.close()

    def death(self) -> str:
        """How a process that closed its end of the pipe died; closes this one."""
        # The pipe closes a moment before the exit code can be read.
        self._process.join(timeout=5)
        code = self._process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"


def _lead(serve: Callable[[Connection], None], connection: Connection) -> None:
    # Its own session: Ctrl-C of the terminal belongs to the engine.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(connection)
