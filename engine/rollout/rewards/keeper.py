"""The process side of a worker: a keeper, and the worker that it starts and outlives.

Whatever the worker starts becomes the keeper's when its own parent ends, in whichever session it is
(PR_SET_CHILD_SUBREAPER). The keeper ends all of it when the worker ends, when the engine asks for
it (SIGTERM) and when the engine is gone; a keeper that is killed takes the worker along
(PR_SET_PDEATHSIG).

A message is a header, then the body: the number of the call, which the answer echoes, and the
length of the body. Requests are pickled, answers are JSON: ["ok", value], ["error", text] or
["memory", ""].

Only the standard library is imported here, function.py, math.py and scores.py import little more:
a worker imports them to start.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from warpo.engine.errors import RewardError

HEADER = struct.Struct("!4sQQ")
MAGIC = b"wrpo"
MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_CHARACTERS = 20_000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ENGINE_CHECK_S = 0.5


def main(settings: dict[str, Any]) -> NoReturn:
    """Start the worker and stay until it, or the engine, has ended."""
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    # Where the engine ignores it, and the keeper would by inheritance, ends leave no status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # A function may have stopped the keeper.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    keeper = os.getpid()
    channel = socket.socket(fileno=settings["channel"])
    channel.set_inheritable(False)
    worker = os.fork()
    if not worker:
        # Its own session: what the function does to its process group does not reach the keeper.
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        _limit_memory(settings["memory_bytes"])
        _serve(channel, settings["opener"], settings["arguments"])
    channel.close()
    status = None
    while status is None and os.getppid() == settings["engine"]:
        came = signal.sigtimedwait(signals, _ENGINE_CHECK_S)
        if came is not None and came.si_signo == signal.SIGTERM:
            break
        status = _reap(worker)
    _end_children()
    _end_like(status)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}, {value}) failed")


def _limit_memory(num_bytes: int) -> None:
    # Not RLIMIT_AS, which also counts the address space that CUDA and thread pools only reserve.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        num_bytes = min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def _reap(worker: int) -> int | None:
    """Collect the children that have ended; the wait status of the worker if it is among them."""
    found = None
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == worker:
                found = status
    return found


def _end_children() -> None:
    """Kill the children, and theirs as they become the keeper's, until there are none."""
    while True:
        for pid in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The name of the process, in parentheses, may hold anything.
            if file.read().rpartition(b")")[2].split()[1].decode() == own:
                found.append(int(name))
    return found


def _end_like(status: int | None) -> NoReturn:
    """End as the worker did, for the engine to read."""
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if status is not None else 0)


def _serve(channel: socket.socket, opener: str, arguments: list[Any]) -> NoReturn:
    """The worker: open what answers, then answer one call after another."""
    own, number = os.getpid(), 0
    answer: Callable[[Any], Any] | None = None
    while True:
        try:
            if answer is None:
                module, _, name = opener.partition(":")
                answer = getattr(importlib.import_module(module), name)(*arguments)
                reply = ["ok", None]
            else:
                number, request = _receive(channel)
                reply = ["ok", answer(request)]
            body = json.dumps(reply).encode()
        except MemoryError:
            body = b'["memory", ""]'
        except RewardError as error:
            body = json.dumps(["error", str(error)[:_MAX_ERROR_CHARACTERS]]).encode()
        if os.getpid() != own:
            # The function forked, and this is the child: the answer is the parent's to give.
            os.write(2, b"a process that a reward function forked returned and was ended\n")
            os._exit(0)
        _send(channel, number, body)
        if answer is None:
            os._exit(0)


def _receive(channel: socket.socket) -> tuple[int, Any]:
    _, number, length = HEADER.unpack(_read(channel, HEADER.size))
    return number, pickle.loads(_read(channel, length))


def _read(channel: socket.socket, count: int) -> bytearray:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        try:
            got = channel.recv_into(view)
        except OSError:
            got = 0
        if not got:
            # Nobody is left to hear why.
            os._exit(0)
        view = view[got:]
    return buffer


def _send(channel: socket.socket, number: int, body: bytes) -> None:
    with suppress(Exception):  # the function may have closed or replaced them
        sys.stdout.flush()
    try:
        channel.sendall(HEADER.pack(MAGIC, number, len(body)) + body)
    except OSError:
        os._exit(0)
