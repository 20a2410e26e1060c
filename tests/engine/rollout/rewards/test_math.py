import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.math_answers import MathAnswers, is_right

# Sympy multiplies it out.
ENDLESS = r"\boxed{9^{9^{9}}}"


@pytest.fixture(scope="module")
def judge():
    with closing(MathAnswers(deadline_s=1, fields=["answer"])) as answers:
        answers(["1"], {"answer": ["1"]})
        yield answers


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("125", "125", True),
        ("57 + 68 = 125", "125", True),
        ("5121", "125", False),
        ("", "125", False),
        (r"so \boxed{0.5}", "1/2", True),
        (r"$\frac{2}{4}$", r"\frac12", True),
        (r"$\frac{2}{4}$", r"$\frac12$", True),
        (r"$(x+1)^2$", "x^2+2x+1", True),
        (r"$(x-1)^2$", "x^2+2x+1", False),
        ("It is 1000.", "1,000", True),
        (r"\boxed{50\%}", "0.5", True),
        (" cat ", "cat", True),
        (r"\boxed{3} is not it, \boxed{4}", r"\boxed{4}", False),
    ],
)
def test_letters_then_values(completion, answer, right):
    assert is_right(completion, answer) is right


def test_items_that_hang_are_killed_and_named_and_the_others_judged(judge):
    completions = ["1", ENDLESS, "2", ENDLESS, "4", r"$\frac{10}{2}$"]
    answers = ["1", "2", 2, "3", 4.0, "5"]
    judged = judge(completions, {"answer": answers})
    assert judged.scores == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    assert judged.failed == {1, 3}
    assert sorted(judged.notes) == [
        f"reward math: completion {index} scores 0, its worker was killed after 1 s: "
        f"{ENDLESS!r}, right is {answers[index]!r}"
        for index in (1, 3)
    ]


def test_workers_that_died_between_calls_are_replaced_and_others_kept(judge):
    old = [worker.pid for worker in judge.workers]
    os.kill(old[0], signal.SIGKILL)
    os.waitid(os.P_PID, old[0], os.WEXITED | os.WNOWAIT)
    judged = judge(["7"] * 50, {"answer": ["7"] * 49 + ["8"]})
    assert (judged.scores, judged.failed, judged.notes) == ([1.0] * 49 + [0.0], set(), [])
    assert [worker.pid for worker in judge.workers][1:] == old[1:]
    assert not os.path.exists(f"/proc/{old[0]}")


def test_a_worker_that_dies_is_named(judge):
    death = threading.Timer(0.3, lambda: os.kill(judge.workers[0].pid, signal.SIGKILL))
    death.start()
    judged = judge([ENDLESS, "1"], {"answer": ["1", "1"]})
    assert (judged.scores, len(judged.notes)) == ([0.0, 1.0], 1)
    assert "completion 0 scores 0, its worker died with signal SIGKILL" in judged.notes[0]


def test_an_interrupted_call_leaves_no_verdicts_for_the_next(judge):
    interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        judge([ENDLESS] * 4, {"answer": ["1"] * 4})
    assert judge(["1", "2"], {"answer": ["2", "2"]}).scores == [0.0, 1.0]


def test_a_call_has_a_deadline_too(judge, monkeypatch):
    """512 items that hang would take 512 * 5 s / workers, 21 minutes on two cores."""
    monkeypatch.setattr("warpo.engine.rollout.rewards.math_answers._CALL_ITEMS", 1)
    monkeypatch.setattr("warpo.engine.rollout.rewards.math_answers._PER_ITEM_S", 0.001)
    start = time.perf_counter()
    judged = judge(["1", *[ENDLESS] * 511], {"answer": ["1"] * 512})
    assert time.perf_counter() - start < 10
    assert judged.scores == [1.0] + [0.0] * 511
    assert judged.failed == set(range(1, 512))
    late = 511 - (len(judged.notes) - 1)
    assert judged.notes[-1] == (
        f"reward math: {late} of 512 completions score 0: they were not judged within 1.512 s"
    )


def test_what_cannot_be_judged_is_refused(judge):
    with pytest.raises(RewardError, match="needs the data field 'answer', the data has prompt, x"):
        MathAnswers(deadline_s=5, fields=["prompt", "x"])
    for answer in ("", None, True, float("nan"), ["1"]):
        with pytest.raises(RewardError, match=r"'answer' of completion 1 must be text or a nu"):
            judge(["1", "1"], {"answer": ["1", answer]})


def test_the_worker_imports_neither_torch_nor_transformers():
    code = (
        "import sys, math_verify\n"
        "from warpo.engine.rollout.rewards import function, math_answers\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == "[]\n", found.stderr
