"""Calls of a function or a server: split between workers, and what is done about one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.scores import Scored, parse_scores

T = TypeVar("T")
Job = TypeVar("Job")
Lane = Callable[[Job], Awaitable[Any]]

RETRY_PAUSES_S = (1.0, 2.0, 4.0)
# What `zero` may take to ask for the completions of failed calls one by one.
ZERO_DEADLINES = 10


class Call(NamedTuple):
    """Completions, and the data fields of each."""

    completions: Sequence[str]
    fields: Mapping[str, Sequence[Any]]

    def split(self, count: int) -> list[Call]:
        """Calls of neighbours, of the same number of completions but for one; fewer than `count`
        where there are fewer completions."""
        size = len(self.completions)
        count = max(1, min(count, size))
        bounds = [size * i // count for i in range(count + 1)]
        return [
            Call(
                self.completions[start:stop],
                {name: column[start:stop] for name, column in self.fields.items()},
            )
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]


class Callee(Protocol):
    """A callable source: each lane makes one call at a time and gives scores, or raises RewardError
    with a message that begins with its name."""

    name: str

    @property
    def lanes(self) -> Sequence[Lane[Call]]: ...

    def close(self) -> None:
        """End its processes."""


class _Threads(ThreadPoolExecutor):
    """Those of an event loop, which end with it or after it: a name server that does not answer
    must not hold up a call past its deadline."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_Threads())
    return loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its result; the caller's event loop, which may be vLLM's, stays."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(coroutine)


async def share(
    lanes: Sequence[Lane[Job]], jobs: Sequence[Job], limit_s: float | None = None
) -> list[Any]:
    """The results of the jobs, in order; each lane takes the next job when it is free.

    The result of a job that raised RewardError is the error, that of one without an answer after
    limit_s is None.
    """
    results: list[Any] = [None] * len(jobs)
    rest = iter(enumerate(jobs))

    async def work(lane: Lane[Job]) -> None:
        for index, job in rest:
            try:
                results[index] = await lane(job)
            except RewardError as error:
                results[index] = error

    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*map(work, lanes))
    except TimeoutError:
        pass
    return results


class Calls:
    """A callee as a `TextScorer`.

    Args:
        on_error: consequence of a failed call. stop: a RewardError. retry: it is made again after
            1, 2 and 4 s, and its fourth failure is a RewardError. zero: its completions are asked
            for one by one, for ZERO_DEADLINES * deadline_s at most; those that fail again or have
            no answer by then score 0.
    """

    def __init__(self, callee: Callee, *, on_error: str, deadline_s: float) -> None:
        self._callee = callee
        self._on_error = on_error
        self._zero_s = ZERO_DEADLINES * deadline_s
        self._gives_steps = False

    def __call__(self, completions: Sequence[str], fields: Mapping[str, Sequence[Any]]) -> Scored:
        """Finite scores, one entry for each completion.

        Raises:
            RewardError: a call failed, and on_error does not make up for it.
        """
        scored = run(self._score(Call(completions, fields)))
        try:
            parse_scores(scored.scores, completions)
        except RewardError as error:  # one call gave numbers, another steps
            raise RewardError(f"{self._callee.name} {error}") from None
        self._gives_steps = any(isinstance(entry, list) for entry in scored.scores)
        return scored

    def close(self) -> None:
        """End the processes of the callee."""
        self._callee.close()

    async def _score(self, call: Call) -> Scored:
        calls = call.split(len(self._callee.lanes))
        results = await share(self._callee.lanes, calls)
        notes: list[str] = []
        retries = 0
        if self._on_error == "retry":
            retries = await self._retry(calls, results, notes)
        failed = _failed(results)
        if failed and self._on_error == "zero":
            return await self._zero(calls, results)
        if failed:
            raise results[failed[0]]
        scores = [score for result in results for score in result]
        return Scored(scores=scores, retries=retries, notes=notes)

    async def _retry(self, calls: list[Call], results: list[Any], notes: list[str]) -> int:
        """Make the failed calls again, into `results`; how many that were."""
        retries = 0
        for pause_s in RETRY_PAUSES_S:
            failed = _failed(results)
            if not failed:
                break
            notes += [f"{_brief(results[i])}; asked again after {pause_s:g} s" for i in failed]
            retries += len(failed)
            await asyncio.sleep(pause_s)
            again = await share(self._callee.lanes, [calls[i] for i in failed])
            for i, result in zip(failed, again, strict=True):
                results[i] = result
        return retries

    async def _zero(self, calls: list[Call], results: list[Any]) -> Scored:
        """The scores, with those of failed calls asked for one by one."""
        ones = [calls[i].split(len(calls[i].completions)) for i in _failed(results)]
        jobs = [one for of_one_call in ones if len(of_one_call) > 1 for one in of_one_call]
        answers = iter(await share(self._callee.lanes, jobs, self._zero_s))
        scores: list[Any] = []
        errors: dict[int, RewardError | None] = {}
        for call, result in zip(calls, results, strict=True):
            if not isinstance(result, RewardError):
                scores += result
                continue
            for _ in call.completions:
                answer = next(answers) if len(call.completions) > 1 else result
                if not isinstance(answer, list):
                    errors[len(scores)] = answer
                scores += answer if isinstance(answer, list) else [None]
        steps = self._gives_steps or any(isinstance(score, list) for score in scores)
        scores = [([] if steps else 0.0) if score is None else score for score in scores]
        return Scored(scores=scores, failed=set(errors), notes=self._describe(errors, len(scores)))

    def _describe(self, errors: dict[int, RewardError | None], count: int) -> list[str]:
        if not errors:
            return []
        first, error = next(iter(errors.items()))
        why = _brief(error) if error else f"no answer within {self._zero_s:g} s"
        return [
            f"{self._callee.name}: {len(errors)} of {count} completions score 0; the first of "
            f"them, completion {first}: {why}"
        ]


def _failed(results: Sequence[Any]) -> list[int]:
    return [i for i, result in enumerate(results) if isinstance(result, RewardError)]


def _brief(error: RewardError) -> str:
    """An error in one line, without the traceback that it may hold."""
    lines = str(error).splitlines()
    return f"{lines[0] if len(lines) == 1 else f'{lines[0]} {lines[-1]}':.300}"
