"""Answers to mathematical problems, checked by math-verify against the data field `answer`.

A completion is right if it is the answer letter by letter, or if math-verify reads a number or an
expression from it that equals the answer: from \\boxed{} first, then from $...$, then the last
plain number. Right scores 1, wrong 0.

Each item is judged in a worker process. One that takes longer than its deadline is killed and
scores 0: sympy computes 9^9^9 for hours.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from decimal import Decimal
from multiprocessing.connection import Connection, wait
from typing import Any

from warpo.engine.errors import RewardError
from warpo.engine.rewards.worker import START_DEADLINE_S, Worker

# What math-verify itself allows for reading an answer, and for comparing two.
ITEM_DEADLINE_S = 5.0
# No answer fills this; a power does, and would take the machine's memory.
_MEMORY_BYTES = 4 << 30
_MAX_WORKERS = 4


class MathAnswers:
    """A few workers, each of which judges one item at a time.

    Args:
        deadline_s: seconds that one item may take, at most ITEM_DEADLINE_S of them.
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
        self._deadline_s = min(deadline_s, ITEM_DEADLINE_S)
        self._slots: list[_Slot] = []
        self._fill()

    def __call__(
        self, completions: Sequence[str], fields: Mapping[str, list]
    ) -> tuple[list[float], list[str]]:
        """1.0 or 0.0 for each completion, and a line about each that was not judged.

        Raises:
            RewardError: an answer is no text or number, or no worker can be started.
        """
        answers = [answer_text(a, f" of completion {i}") for i, a in enumerate(fields["answer"])]
        self._fill()
        try:
            return self._judge(list(zip(completions, answers, strict=True)))
        except BaseException:
            # Verdicts are still to come, and the next call must not read them as its own.
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers and reap them. The next call would start others."""
        for slot in self._slots:
            slot.worker.close()
        self._slots = []

    def _fill(self) -> None:
        """A living worker in every slot: a death between calls costs no completion its reward."""
        for slot in self._slots:
            slot.revive()
        if not self._slots:
            count = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
            self._slots = [_Slot() for _ in range(count)]

    def _judge(self, items: list[tuple[str, str]]) -> tuple[list[float], list[str]]:
        rewards, notes = [0.0] * len(items), []
        waiting = deque(range(len(items)))
        while waiting or any(slot.item is not None for slot in self._slots):
            for slot in self._slots:
                if waiting and slot.idle:
                    slot.give(waiting.popleft(), items, self._deadline_s)
            busy = [slot for slot in self._slots if not slot.idle]
            pause = min(slot.deadline for slot in busy) - time.monotonic()
            answered = wait([slot.worker.connection for slot in busy], max(0.0, pause))
            for slot in busy:
                index = slot.item
                verdict, failure = slot.poll(answered)
                if index is None:
                    if failure:
                        raise RewardError(f"a worker of reward math {failure} as it started")
                elif failure:
                    notes.append(
                        f"reward math: completion {index} scores 0, its worker {failure}: "
                        f"{items[index][0]!r:.80}, right is {items[index][1]!r:.40}"
                    )
                else:
                    rewards[index] = float(verdict)
        return rewards, notes


class _Slot:
    """A worker and what it is busy with: starting, an item, or nothing."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.worker = Worker(_serve, "warpo-math")
        self.item: int | None = None
        self._started = False
        self._limit_s = START_DEADLINE_S
        self.deadline = time.monotonic() + self._limit_s

    def revive(self) -> None:
        if not self.worker.alive:
            self.worker.close()
            self._start()

    @property
    def idle(self) -> bool:
        return self._started and self.item is None

    def give(self, index: int, items: Sequence[tuple[str, str]], limit_s: float) -> None:
        self.item, self._limit_s = index, limit_s
        self.deadline = time.monotonic() + limit_s
        self.worker.connection.send((*items[index], limit_s))

    def poll(self, answered: Sequence[object]) -> tuple[bool, str]:
        """The verdict, if there is one, and how the worker ended if it did; another follows it."""
        if self.worker.connection in answered:
            try:
                verdict = self.worker.connection.recv()
            except (EOFError, OSError):
                failure = f"died with {self.worker.death()}"
            else:
                self._started, self.item = True, None
                return verdict, ""
        elif time.monotonic() < self.deadline:
            return False, ""
        else:
            self.worker.close()
            failure = f"was killed after {self._limit_s:g} s"
        self._start()
        return False, failure


def answer_text(answer: Any, owner: str = "") -> str:
    """The right answer as text.

    Raises:
        RewardError: it is no text or number.
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


def _serve(connection: Connection) -> None:
    """The worker: judge one item after another."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # It warns that its own time limits are off.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    import math_verify  # noqa: F401  # its import is not the first item's time

    connection.send(True)
    while True:
        try:
            completion, answer, limit_s = connection.recv()
        except EOFError:
            return
        # Should the engine itself be killed, nobody else would end an item that hangs.
        signal.alarm(math.ceil(limit_s) + 10)
        connection.send(is_right(completion, answer))
        signal.alarm(0)


def is_right(completion: str, answer: str) -> bool:
    """Whether the completion states the answer, in its letters or in its value."""
    from math_verify import parse, verify

    if completion.strip() == answer:
        return True
    if not any(mark in answer for mark in ("$", "\\boxed{", "\\(", "\\[")):
        answer = f"\\boxed{{{answer}}}"
    # No limits by signals: the engine kills the process.
    right = parse(answer, parsing_timeout=None)
    return verify(right, parse(completion, parsing_timeout=None), timeout_seconds=None)
