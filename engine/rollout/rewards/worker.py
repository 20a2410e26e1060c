"""A process of its own for what may hang or crash; a deadline ends it and all that it started."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any

from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.keeper import HEADER, MAGIC, MAX_ANSWER_BYTES

# Importing torch and a verifier on a loaded machine takes tens of seconds.
START_DEADLINE_S = 180.0
_SIGNALS = {int(number): number.name for number in signal.Signals}
# -P: a file in the current directory must not be imported for one of the standard library.
_START = (
    "import json, sys; settings = json.loads(sys.argv[1]); sys.path[:] = settings['path']; "
    "from warpo.engine.rollout.rewards.keeper import main; main(settings)"
)


class WorkerFailure(RewardError):
    """The worker gave no answer, and is gone.

    Attributes:
        kind: late, memory, died or nonsense.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A process that answers one call after another; one that is gone is started again.

    Args:
        opener: "module:function" that the process calls once, with `arguments`; what it returns is
            called with each request, and returns JSON.
        arguments: JSON.
        memory_gib: memory that the process may allocate.
    """

    def __init__(self, opener: str, arguments: list[Any], *, memory_gib: float) -> None:
        self._opener = opener
        self._arguments = arguments
        self._memory_gib = memory_gib
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket
        self._number = 0
        self._opened = False

    @property
    def pid(self) -> int | None:
        """The process that ends all others of this worker when it is told to."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start the process, unless it runs, without waiting until it can answer."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._channel, remote = socket.socketpair()
        settings = {
            "path": sys.path,
            "channel": remote.fileno(),
            "engine": os.getpid(),
            "memory_bytes": int(self._memory_gib * 2**30),
            "opener": self._opener,
            "arguments": self._arguments,
        }
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                pass_fds=[remote.fileno()],
                start_new_session=True,
            )
        self._channel.setblocking(False)
        self._number, self._opened = 0, False
        atexit.register(self.close)

    async def open(self) -> None:
        """Start the process, unless it runs, and wait until it can answer.

        Raises:
            RewardError: the opener raised it.
            WorkerFailure: it was late or died.
        """
        self.launch()
        if not self._opened:
            try:
                await self._answer(START_DEADLINE_S)
            except RewardError:
                self.close()
                raise
            self._opened = True

    async def ask(self, request: Any, deadline_s: float) -> Any:
        """The answer to a request, of whatever JSON.

        Raises:
            RewardError: the process raised it.
            WorkerFailure: it was late, died, ran out of memory or sent something else; it is gone.
        """
        await self.open()
        self._number += 1
        body = pickle.dumps(request)
        return await self._answer(deadline_s, HEADER.pack(MAGIC, self._number, len(body)) + body)

    async def _answer(self, deadline_s: float, message: bytes = b"") -> Any:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline_s):
                await loop.sock_sendall(self._channel, message)
                kind, value = await self._receive()
        except TimeoutError:
            self.close()
            raise WorkerFailure("late", f"was killed after {deadline_s:g} s") from None
        except (OSError, EOFError):
            raise WorkerFailure("died", self._death()) from None
        except BaseException:
            # The answer is still to come, and the next call must not read it as its own.
            self.close()
            raise
        if kind == "ok":
            return value
        if kind == "error":
            raise RewardError(str(value))
        self.close()
        raise WorkerFailure("memory", f"needed more than {self._memory_gib:g} GiB of memory")

    async def _receive(self) -> tuple[str, Any]:
        magic, number, length = HEADER.unpack(await self._read(HEADER.size))
        if magic != MAGIC:
            self._refuse("something that is not an answer")
        if number != self._number:
            self._refuse("the answer to another call")
        if length > MAX_ANSWER_BYTES:
            self._refuse(f"more than {MAX_ANSWER_BYTES >> 20} MiB")
        try:
            kind, value = json.loads(await self._read(length))
        except (ValueError, TypeError, RecursionError):
            kind, value = "", None
        if kind not in ("ok", "error", "memory"):
            self._refuse("something that is not an answer")
        return kind, value

    def _refuse(self, what: str) -> None:
        raise WorkerFailure("nonsense", f"sent {what} and was killed")

    async def _read(self, count: int) -> bytearray:
        loop, buffer = asyncio.get_running_loop(), bytearray(count)
        view = memoryview(buffer)
        while view:
            got = await loop.sock_recv_into(self._channel, view)
            if not got:
                raise EOFError
            view = view[got:]
        return buffer

    def _death(self) -> str:
        """Describe how a process that closed its end of the channel died."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.close()
            return "closed its connection to the engine and was killed"
        self.close()
        if code == -signal.SIGKILL:
            return "died with signal SIGKILL, as when the machine runs out of memory"
        if code < 0:
            return f"died with signal {_SIGNALS.get(-code, -code)}"
        return f"died with exit code {code}"

    def close(self) -> None:
        """End the process and all that it started. The next call would start another."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._channel.close()
