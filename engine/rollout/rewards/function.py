"""The user's reward function, in processes of its own that a deadline really kills."""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.base import RewardSource, SourceContext
from warpo.engine.rollout.rewards.calls import Call, run
from warpo.engine.rollout.rewards.scores import Steps, parse_scores
from warpo.engine.rollout.rewards.texts import called
from warpo.engine.rollout.rewards.worker import START_DEADLINE_S, Worker, WorkerFailure


def open_source(target: str, context: SourceContext) -> RewardSource:
    """`RewardFunction` as the config has it."""
    settings = context.settings
    function = RewardFunction(
        target,
        deadline_s=settings.deadline_s,
        fields=context.fields,
        workers=settings.workers,
        memory_gib=settings.memory_gib,
    )
    return called(function, context)


class RewardFunction:
    """`module:function` as a source of scores.

    The function is called as function(completions, **fields) with the fields that its signature
    names, all of them if it takes **kwargs; what an `async def` returns is awaited. It returns for
    each completion a number, or for each a list of (end, score): `end` is the number of characters
    of the completion up to the end of that step.

    Args:
        spec: "module:function"; the current directory is searched as well.
        deadline_s: seconds that one call may take.
        fields: names of the data fields there will be, to refuse a function that wants others.
        workers: processes, each of which imports the module and takes a part of the completions.
        memory_gib: memory that each process may allocate.

    Raises:
        RewardError: the function cannot be imported, or needs a field that is not there.
    """

    def __init__(
        self,
        spec: str,
        *,
        deadline_s: float,
        fields: Sequence[str],
        workers: int = 1,
        memory_gib: float = 64.0,
    ) -> None:
        self.name = f"reward function {spec}"
        self._spec = spec
        self._deadline_s = deadline_s
        self._memory_gib = memory_gib
        opener = f"{__name__}:open_function"
        self.workers = [
            Worker(opener, [spec, list(fields)], memory_gib=memory_gib) for _ in range(workers)
        ]
        self.lanes = [functools.partial(self._ask, worker) for worker in self.workers]
        try:
            run(self._open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers and what they started. The next call would start others."""
        for worker in self.workers:
            worker.close()

    async def _open(self) -> None:
        for worker in self.workers:
            worker.launch()
        for worker in self.workers:
            await self._opened(worker)

    async def _opened(self, worker: Worker) -> None:
        try:
            await worker.open()
        except WorkerFailure as failure:
            if failure.kind == "late":
                raise RewardError(
                    f"importing the module of {self.name} took longer than {START_DEADLINE_S:g} s"
                ) from None
            raise self._explained(failure, 0) from None

    async def _ask(self, worker: Worker, call: Call) -> list[float] | list[Steps]:
        """Finite scores, one entry for each completion.

        Raises:
            RewardError: the function raised, died, ran past the deadline or returned nonsense.
        """
        await self._opened(worker)
        completions = list(call.completions)
        try:
            answer = await worker.ask((completions, dict(call.fields)), self._deadline_s)
        except WorkerFailure as failure:
            raise self._explained(failure, len(completions)) from None
        try:
            return parse_scores(answer, completions)
        except RewardError as error:
            raise RewardError(f"{self.name} {error}") from None

    def _explained(self, failure: WorkerFailure, count: int) -> RewardError:
        if failure.kind == "late":
            return RewardError(
                f"{self.name} took longer than {self._deadline_s:g} s for {count} completions and "
                "was killed: raise reward.deadline_s, or bound the time that the function spends "
                "on a completion"
            )
        if failure.kind == "memory":
            return RewardError(
                f"{self.name} needs more memory than reward.memory_gib = {self._memory_gib:g}: "
                "raise it, or let the function take less"
            )
        return RewardError(
            f"the worker process of {self.name} {failure}; what it wrote last stands above"
        )


def open_function(spec: str, fields: list[str]) -> Callable[[Any], Any]:
    """In the worker: import the function; returns what answers a call of it."""
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    function = load_function(spec)
    names = _accepted(spec, function, fields)
    runner = asyncio.Runner()

    def answer(request: tuple[list[str], dict[str, list]]) -> list[float] | list[Steps]:
        completions, columns = request
        chosen = columns if names is None else {name: columns[name] for name in names}
        return _call(spec, runner, function, completions, chosen)

    return answer


def load_function(spec: str) -> Callable:
    """The function named by "module:function".

    Raises:
        RewardError: there is none; the message names the nearest one.
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
    except MemoryError:
        raise
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
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise RewardError(
            f"reward function {spec} has no signature: wrap it in a Python function"
        ) from None
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
                f"reward function {spec} wants {name!r}, which is not a field of the data: {hint}"
            )
    if "completions" not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise RewardError(f"reward function {spec} must have a parameter named completions")
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return [name for name in parameters if name in fields]


def _call(
    spec: str,
    runner: asyncio.Runner,
    function: Callable,
    completions: list[str],
    columns: dict[str, list],
) -> list[float] | list[Steps]:
    try:
        scores = function(completions=completions, **columns)
        if inspect.isawaitable(scores):
            scores = runner.run(_awaited(scores))
        return parse_scores(scores, completions)
    except RewardError as error:
        raise RewardError(f"reward function {spec} {error}") from None
    except MemoryError:
        raise
    except Exception:  # the user's function may raise anything; the engine hears all of it
        raised = traceback.format_exc()
        if "can't allocate memory" in raised:  # how PyTorch says it
            raise MemoryError from None
        raise RewardError(f"reward function {spec} raised\n{raised}") from None


async def _awaited(scores: Awaitable[Any]) -> Any:
    return await scores
