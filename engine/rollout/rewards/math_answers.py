"""Answers to mathematical problems, checked by math-verify against the data field `answer`.

A completion is right if it is the answer letter by letter, or if math-verify reads a number or an
expression from it that equals the answer: from \\boxed{} first, then from $...$, then the last
plain number. Right scores 1, wrong 0.

Each item is judged in a worker process. One that takes longer than its deadline is killed and
scores 0: sympy computes 9^9^9 for hours. A call has a deadline too, and what is not judged by then
scores 0.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from warpo.engine.data.json_lines import Row
from warpo.engine.errors import DataError, RewardError
from warpo.engine.rollout.rewards.base import RewardSource, SourceContext
from warpo.engine.rollout.rewards.calls import run, share
from warpo.engine.rollout.rewards.scores import Scored
from warpo.engine.rollout.rewards.texts import TextSource
from warpo.engine.rollout.rewards.worker import Worker, WorkerFailure

# What math-verify itself allows for reading an answer, and for comparing two.
ITEM_DEADLINE_S = 5.0
# A call may take as many times what an item may, and so much more for each item: those that do not
# hang take 5 to 20 ms.
_CALL_ITEMS, _PER_ITEM_S = 10, 0.2
# No answer fills this; a power does, and would take the machine's memory.
_MEMORY_GIB = 4.0
_MAX_WORKERS = 8


def open_source(target: str, context: SourceContext) -> RewardSource:
    """`MathAnswers` as the config has it."""
    answers = MathAnswers(deadline_s=context.settings.deadline_s, fields=context.fields)
    return TextSource(answers, context.tokenizer)


def check_row(row: Row) -> None:
    """Refuse a row whose answer is neither text nor a number."""
    if "answer" in row:
        try:
            answer_text(row["answer"])
        except RewardError as error:
            raise DataError(str(error)) from None


class MathAnswers:
    """A few workers, each of which judges one item at a time.

    Args:
        deadline_s: seconds that one item may take, at most ITEM_DEADLINE_S of them. A call may take
            _CALL_ITEMS times that, and _PER_ITEM_S for each of its items.
        fields: names of the data fields there will be.

    Raises:
        RewardError: there is no field `answer`, or math-verify is not installed.
    """

    def __init__(self, *, deadline_s: float, fields: Sequence[str]) -> None:
        if "answer" not in fields:
            raise RewardError(
                "reward math needs the data field 'answer', the data has "
                f"{', '.join(fields)}: rename the field with the right answers"
            )
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("reward math needs math-verify: pip install math-verify")
        self._item_s = min(deadline_s, ITEM_DEADLINE_S)
        count = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.workers = [
            Worker(f"{__name__}:open_judge", [], memory_gib=_MEMORY_GIB) for _ in range(count)
        ]
        # They load while the models do.
        for worker in self.workers:
            worker.launch()

    def __call__(self, completions: Sequence[str], fields: Mapping[str, list]) -> Scored:
        """1.0 or 0.0 for each completion, and a line about each that was not judged.

        Raises:
            RewardError: an answer is neither text nor a number, or no worker can be started.
        """
        answers = [answer_text(a, f" of completion {i}") for i, a in enumerate(fields["answer"])]
        return run(self._judge(list(zip(completions, answers, strict=True))))

    def close(self) -> None:
        """Kill the workers. The next call would start others."""
        for worker in self.workers:
            worker.close()

    async def _judge(self, items: list[tuple[str, str]]) -> Scored:
        for worker in self.workers:
            worker.launch()
        for worker in self.workers:
            try:
                await worker.open()
            except WorkerFailure as failure:
                raise RewardError(f"a worker of reward math {failure} as it started") from None
        lanes = [functools.partial(self._ask, worker) for worker in self.workers]
        limit_s = _CALL_ITEMS * self._item_s + _PER_ITEM_S * len(items)
        verdicts = await share(lanes, items, limit_s)
        failed = [i for i, verdict in enumerate(verdicts) if not isinstance(verdict, bool)]
        notes = [
            f"reward math: completion {i} scores 0, its worker {verdicts[i]}: "
            f"{items[i][0]!r:.80}, right is {items[i][1]!r:.40}"
            for i in failed
            if verdicts[i] is not None
        ]
        if late := verdicts.count(None):
            notes.append(
                f"reward math: {late} of {len(items)} completions score 0: they were not judged "
                f"within {limit_s:g} s"
            )
        return Scored(
            scores=[float(verdict is True) for verdict in verdicts],
            failed=set(failed),
            notes=notes,
        )

    async def _ask(self, worker: Worker, item: tuple[str, str]) -> bool:
        return bool(await worker.ask(item, self._item_s))


def answer_text(answer: Any, owner: str = "") -> str:
    """The right answer as text.

    Raises:
        RewardError: it is neither text nor a number.
    """
    if isinstance(answer, float) and math.isfinite(answer):
        return f"{Decimal(repr(answer)):f}"
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    raise RewardError(
        f"reward math: the field 'answer'{owner} must be text or a number, got {answer!r:.60}"
    )


def open_judge() -> Callable[[tuple[str, str]], bool]:
    """In the worker: load math-verify; returns a judge of (completion, answer)."""
    # It warns that its own time limits are off.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    import math_verify  # noqa: F401  # its import is not the first item's time

    return lambda item: is_right(*item)


def is_right(completion: str, answer: str) -> bool:
    """True if the completion states the answer, in its letters or in its value."""
    from math_verify import parse, verify

    if completion.strip() == answer:
        return True
    if not any(mark in answer for mark in ("$", "\\boxed{", "\\(", "\\[")):
        answer = f"\\boxed{{{answer}}}"
    # No limits by signals: the engine kills the process.
    right = parse(answer, parsing_timeout=None)
    return verify(right, parse(completion, parsing_timeout=None), timeout_seconds=None)
