"""The user's reward function, in a process of its own that a deadline really kills.

This module imports nothing heavy: the worker process imports it to start.
"""

from __future__ import annotations

import atexit
import difflib
import importlib
import inspect
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from warpo.engine.errors import RewardError

# Importing torch and a verifier on a loaded machine takes tens of seconds.
_START_DEADLINE_S = 180.0


class Reward:
    """`module:function` as a callable: completions and data fields in, one number each out.

    The function is called as function(completions, **fields) with the fields that its signature
    names, all of them if it takes **kwargs.

    Args:
        spec: "module:function"; the current directory is searched as well.
        deadline_s: seconds that one call may take.
        fields: names of the data fields there will be, to refuse a function that wants others.

    Raises:
        RewardError: the function cannot be imported, or needs a field that is not there.
    """

    def __init__(self, spec: str, *, deadline_s: float, fields: Sequence[str]) -> None:
        self._spec = spec
        self._deadline_s = deadline_s
        self._fields = list(fields)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        # Before multiprocessing's own exit handler, which would wait for the worker.
        atexit.register(self.close)
        try:
            self._start()
        except RewardError:
            self.close()
            raise

    def __call__(self, completions: Sequence[str], fields: Mapping[str, list]) -> list[float]:
        """One finite number for each completion.

        Raises:
            RewardError: the function raised, died, ran past the deadline or returned nonsense.
        """
        if self._process is None:
            self._start()
        late = (
            f"reward function {self._spec} took longer than {self._deadline_s:g} s for "
            f"{len(completions)} completions and was killed: raise reward.deadline_s, or bound "
            "the time that the function spends on a completion"
        )
        return self._ask((list(completions), dict(fields)), self._deadline_s, late)

    def close(self) -> None:
        """Kill the worker and reap it. The next call would start another."""
        atexit.unregister(self.close)
        self._kill()

    def __enter__(self) -> Reward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        # vLLM changes the default start method; a forked child would share its CUDA context.
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        # Not a daemon: those may not start processes, and verifiers do.
        self._process = context.Process(target=_serve, args=(remote,), name="warpo-reward")
        self._process.start()
        remote.close()
        late = (
            f"importing the module of reward function {self._spec} took longer than "
            f"{_START_DEADLINE_S:g} s"
        )
        request = (self._spec, self._fields, os.getcwd(), self._deadline_s)
        self._ask(request, _START_DEADLINE_S, late)

    def _ask(self, request: Any, deadline_s: float, late: str) -> Any:
        """The worker's answer; a timer kills the worker, so no read or write can block for ever."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._kill_group()

        assert self._connection is not None
        timer = threading.Timer(deadline_s, expire)
        timer.start()
        died = False
        try:
            self._connection.send(request)
            ok, answer = self._connection.recv()
        except (EOFError, OSError):
            died = True
        except BaseException:
            timer.cancel()
            # The answer is still to come, and the next call must not read it as its own.
            self._kill()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set():
            self._kill()
            raise RewardError(late)
        if died:
            raise RewardError(self._death())
        if not ok:
            raise RewardError(answer)
        return answer

    def _death(self) -> str:
        assert self._process is not None
        # The pipe closes a moment before the exit code can be read.
        self._process.join(timeout=5)
        code = self._process.exitcode
        self._kill()
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return (
            f"the worker process of reward function {self._spec} died with {how}; "
            "what it wrote last stands above"
        )

    def _kill_group(self) -> None:
        process = self._process
        if process is None or process.pid is None:
            return
        try:
            # The worker leads its own group, so what it started goes with it.
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()

    def _kill(self) -> None:
        if self._process is None:
            return
        self._kill_group()
        self._process.join()
        self._process.close()
        assert self._connection is not None
        self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection) -> None:
    """The worker: import the function, then answer one call after another."""
    # Its own session: Ctrl-C of the terminal belongs to the engine.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec, fields, directory, deadline_s = connection.recv()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        function = load_function(spec)
        names = _accepted(spec, function, fields)
    except RewardError as error:
        connection.send((False, str(error)))
        return
    connection.send((True, None))
    while True:
        try:
            completions, columns = connection.recv()
        except EOFError:
            return
        # Should the engine itself be killed, nobody else would end a call that hangs.
        signal.alarm(math.ceil(deadline_s) + 10)
        chosen = columns if names is None else {name: columns[name] for name in names}
        connection.send(_call(spec, function, completions, chosen))
        signal.alarm(0)


def load_function(spec: str) -> Callable:
    """The function named by "module:function".

    Raises:
        RewardError: there is none; names the nearest that there is.
    """
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise RewardError(
                f"reward function {spec}: there is no module {error.name}: it must be installed "
                f"or lie in the current directory {os.getcwd()}"
            ) from None
        raise RewardError(
            f"reward function {spec}: its module fails to import\n{traceback.format_exc()}"
        ) from None
    except Exception:  # the user's module may raise anything
        raise RewardError(
            f"reward function {spec}: its module fails to import\n{traceback.format_exc()}"
        ) from None
    function = getattr(module, name, None)
    if callable(function):
        return function
    callables = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
    near = difflib.get_close_matches(name, callables, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(callables) or 'none'}"
    raise RewardError(f"reward function {spec}: {module_name} has no function {name!r}: {hint}")


def _accepted(spec: str, function: Callable, fields: Sequence[str]) -> list[str] | None:
    """The fields to pass; None for all."""
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if name != "completions" and name not in fields and not optional:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields) or 'none'}"
            raise RewardError(
                f"reward function {spec} wants {name!r}, which is no field of the data: {hint}"
            )
    if "completions" not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise RewardError(f"reward function {spec} must have a parameter named completions")
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return [name for name in parameters if name in fields]


def _call(
    spec: str, function: Callable, completions: list[str], columns: dict[str, list]
) -> tuple[bool, Any]:
    try:
        return True, _numbers(function(completions=completions, **columns), completions)
    except RewardError as error:
        return False, f"reward function {spec} {error}"
    except Exception:  # the user's function may raise anything; the engine hears all of it
        return False, f"reward function {spec} raised\n{traceback.format_exc()}"


def _numbers(rewards: Any, completions: list[str]) -> list[float]:
    wanted = f"must return a list of {len(completions)} numbers"
    if isinstance(rewards, (str, bytes, Mapping, set)) or not hasattr(rewards, "__len__"):
        raise RewardError(f"{wanted}, returned {type(rewards).__name__}: {rewards!r:.80}")
    if len(rewards) != len(completions):
        raise RewardError(f"{wanted}, one for each completion, returned {len(rewards)}")
    numbers = []
    for i, reward in enumerate(rewards):
        place = f"for completion {i}, {completions[i]!r:.80}"
        if not hasattr(reward, "__float__"):
            raise RewardError(f"{wanted}, returned {reward!r:.80} {place}")
        numbers.append(float(reward))
        if not math.isfinite(numbers[-1]):
            raise RewardError(f"returned {numbers[-1]} {place}: rewards must be finite")
    return numbers
