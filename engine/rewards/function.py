"""The user's reward function, in a process of its own that a deadline really kills."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from warpo.engine.errors import RewardError
from warpo.engine.rewards.scores import Steps, parse_scores
from warpo.engine.rewards.worker import START_DEADLINE_S, Worker


class RewardFunction:
    """`module:function` as a callable: completions and data fields in, scores out.

    The function is called as function(completions, **fields) with the fields that its signature
    names, all of them if it takes **kwargs. It returns for each completion a number, or for each a
    list of (end, score): `end` is the number of characters of the completion up to the end of that
    step.

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
        self._worker: Worker | None = None
        self._start()

    def __call__(
        self, completions: Sequence[str], fields: Mapping[str, list]
    ) -> list[float] | list[Steps]:
        """Finite scores, one entry for each completion.

        Raises:
            RewardError: the function raised, died, ran past the deadline or returned nonsense.
        """
        if self._worker is None:
            self._start()
        late = (
            f"reward function {self._spec} took longer than {self._deadline_s:g} s for "
            f"{len(completions)} completions and was killed: raise reward.deadline_s, or bound "
            "the time that the function spends on a completion"
        )
        return self._ask((list(completions), dict(fields)), self._deadline_s, late)

    def close(self) -> None:
        """Kill the worker and reap it. The next call would start another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> None:
        self._worker = Worker(_serve, "warpo-reward")
        late = (
            f"importing the module of reward function {self._spec} took longer than "
            f"{START_DEADLINE_S:g} s"
        )
        request = (self._spec, self._fields, os.getcwd(), self._deadline_s)
        try:
            self._ask(request, START_DEADLINE_S, late)
        except RewardError:
            self.close()
            raise

    def _ask(self, request: Any, deadline_s: float, late: str) -> Any:
        """The worker's answer; a timer kills the worker, so no read or write can block for ever."""
        assert self._worker is not None
        worker, expired = self._worker, threading.Event()

        def expire() -> None:
            expired.set()
            worker.kill()

        timer = threading.Timer(deadline_s, expire)
        timer.start()
        died = False
        try:
            worker.connection.send(request)
            ok, answer = worker.connection.recv()
        except (EOFError, OSError):
            died = True
        except BaseException:
            timer.cancel()
            # The answer is still to come, and the next call must not read it as its own.
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set():
            self.close()
            raise RewardError(late)
        if died:
            self._worker = None
            raise RewardError(
                f"the worker process of reward function {self._spec} died with {worker.death()}; "
                "what it wrote last stands above"
            )
        if not ok:
            raise RewardError(answer)
        return answer


def _serve(connection: Connection) -> None:
    """The worker: import the function, then answer one call after another."""
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
        return True, parse_scores(function(completions=completions, **columns), completions)
    except RewardError as error:
        return False, f"reward function {spec} {error}"
    except Exception:  # the user's function may raise anything; the engine hears all of it
        return False, f"reward function {spec} raised\n{traceback.format_exc()}"
