import os
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from warpo.engine.errors import RewardError
from warpo.engine.rewards.math import MathAnswers, is_right

# Sympy multiplies it out.
ENDLESS = r"\boxed{9^{9^{9}}}"


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


def test_items_that_hang_are_killed_and_named_and_the_others_judged():
    completions = ["1", ENDLESS, "2", ENDLESS, "4", r"$\frac{10}{2}$"]
    answers = ["1", "2", 2, "3", 4.0, "5"]
    with closing(MathAnswers(deadline_s=1, fields=["answer"])) as judge:
        rewards, notes = judge(completions, {"answer": answers})
        assert rewards == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
        assert sorted(notes) == [
            f"reward math: completion {index} scores 0, its worker was killed after 1 s: "
            f"{ENDLESS!r}, right is {answers[index]!r}"
            for index in (1, 3)
        ]
        pids = [slot.worker.pid for slot in judge._slots]
        assert judge(["7"] * 50, {"answer": ["7"] * 49 + ["8"]}) == ([1.0] * 49 + [0.0], [])
        assert [slot.worker.pid for slot in judge._slots] == pids
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_worker_that_dies_is_named():
    with closing(MathAnswers(deadline_s=5, fields=["answer"])) as judge:
        while not all(slot.idle for slot in judge._slots):
            judge(["1"], {"answer": ["1"]})
        death = threading.Timer(0.3, judge._slots[0].worker.kill)
        death.start()
        rewards, notes = judge([ENDLESS, "1"], {"answer": ["1", "1"]})
        assert (rewards, len(notes)) == ([0.0, 1.0], 1)
        assert "completion 0 scores 0, its worker died with signal SIGKILL" in notes[0]


def test_a_worker_that_died_between_calls_is_replaced():
    with closing(MathAnswers(deadline_s=5, fields=["answer"])) as judge:
        while not all(slot.idle for slot in judge._slots):
            judge(["1"], {"answer": ["1"]})
        for slot in judge._slots:
            slot.worker.kill()
            slot.worker._process.join()
        assert judge(["1"] * 4, {"answer": ["1"] * 4}) == ([1.0] * 4, [])


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(RewardError, match="needs the data field 'answer', the data has prompt, x"):
        MathAnswers(deadline_s=5, fields=["prompt", "x"])
    with closing(MathAnswers(deadline_s=5, fields=["answer"])) as judge:
        for answer in ("", None, True, float("nan"), ["1"]):
            with pytest.raises(RewardError, match=r"'answer' of completion 1 must be text or a nu"):
                judge(["1", "1"], {"answer": ["1", answer]})


def test_the_worker_imports_neither_torch_nor_transformers():
    code = (
        "import sys, math_verify, warpo.engine.rewards.math, warpo.engine.rewards.function\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == "[]\n", found.stderr


def test_an_interrupted_call_leaves_no_verdicts_for_the_next(monkeypatch):
    with closing(MathAnswers(deadline_s=30, fields=["answer"])) as judge:
        judge(["1"], {"answer": ["1"]})

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("warpo.engine.rewards.math.wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                judge(["1"] * 4, {"answer": ["1"] * 4})
        start = time.perf_counter()
        assert judge(["1", "2"], {"answer": ["2", "2"]}) == ([0.0, 1.0], [])
        assert time.perf_counter() - start < 30
