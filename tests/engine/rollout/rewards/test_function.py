import os
import subprocess
import sys
import time
from contextlib import closing

import pytest

from tests.torture import rewards as hostile
from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.calls import Calls
from warpo.engine.rollout.rewards.function import RewardFunction

MODULE = """\
import os, signal, subprocess, sys, time

def exact(completions, answer):
    return [text == right for text, right in zip(completions, answer)]

def count_fields(completions, **fields):
    return [len(fields)] * len(completions)

def spin(completions):
    if completions[0] == "fast":
        return [0.5] * len(completions)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass

def hold_the_gil(completions):
    return [float(sum(range(10**13)))]

def use_a_pool(completions):
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(len, completions)

def leave(completions):
    os._exit(3)

def crash(completions):
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(completions):
    raise KeyError("the key")

def too_few(completions): return [1.0]
def not_finite(completions): return [1.0, float("nan")]
def no_number(completions): return [None, 1.0]
def as_text(completions): return "ab"
def no_list(completions): return 1.0

def as_array(completions):
    import numpy
    return numpy.ones(len(completions), dtype="float32")

def interrupt_me(completions):
    os.kill(os.getpid(), signal.SIGINT)
    return [1.0] * len(completions)

def steps(completions):
    return [[(1, 0.5), [2, -1]], []]

def mixed(completions): return [[(1, 0.5)], 1.0]
def falling(completions): return [[(1, 0.5), (1, 0.5)], []]
def too_far(completions): return [[(4, 0.5)], []]
def no_pair(completions): return [[0.5], []]
def infinite_step(completions): return [[(1, float("inf"))], []]

def pid(completions): return [os.getpid()] * len(completions)

def at_odds(completions):
    if "crash" in completions: os._exit(3)
    if "late" in completions: time.sleep(100)
    if "bad" in completions: raise ValueError("a bad one")
    return [len(text) for text in completions]

def steps_at_odds(completions):
    at_odds(completions)
    return [[(1, 1.0)] for text in completions]

def by_part(completions):
    return [1.0] * len(completions) if "a" in completions else [[(1, 1.0)]] * len(completions)

def flaky(completions):
    with open("calls", "a+") as file:
        file.write("x")
        file.seek(0)
        if len(file.read()) < 3: raise OSError("not yet")
    return [1.0] * len(completions)

async def awaited(completions):
    import asyncio
    global lock
    lock = globals().get("lock") or asyncio.Lock()  # it belongs to the event loop of its first use
    async def one(text):
        async with lock:
            await asyncio.sleep(0)
            return len(text)
    return await asyncio.gather(*map(one, completions))

def fill(completions): return bytearray(1 << 40)
def fill_by_torch(completions):
    import torch
    return torch.zeros(1 << 40)

def wants(completions, anwser): return []
def no_completions(answer): return []
constant = 3
"""


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    (tmp_path / "scores.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import absent_dependency\n")
    (tmp_path / "raising.py").write_text("raise ValueError('at import')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(name, deadline_s=30.0, fields=(), on_error="stop", **options):
    """A function of scores.py, and its processes ended at the end of the block."""
    function = RewardFunction(
        f"scores:{name}", deadline_s=deadline_s, fields=list(fields), **options
    )
    return closing(Calls(function, on_error=on_error, deadline_s=deadline_s))


def call(name, deadline_s=30.0, completions=("a", "b"), fields=None, **options):
    with opened(name, deadline_s, fields or (), **options) as reward:
        return reward(completions, fields or {}).scores


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rewards_come_back_as_floats_and_see_only_the_fields_they_name():
    fields = {"prompt": ["p", "q"], "answer": ["a", "x"]}
    assert call("exact", fields=fields) == [1.0, 0.0]
    assert call("count_fields", fields=fields) == [2.0, 2.0]
    assert call("as_array") == [1.0, 1.0]


def test_a_function_may_score_steps():
    assert call("steps", completions=("abc", "")) == [[(1, 0.5), (2, -1.0)], []]


def test_a_function_may_start_processes():
    assert call("use_a_pool", completions=("a", "bcd")) == [1.0, 3.0]


@pytest.mark.parametrize("name", ["spin", "hold_the_gil"])
def test_the_deadline_kills(name):
    start = time.perf_counter()
    with pytest.raises(
        RewardError,
        match=rf"scores:{name} took longer than 0.5 s for 2 completions and was killed: "
        r"raise reward\.deadline_s",
    ):
        call(name, deadline_s=0.5)
    # 0.5 s is the deadline; the rest is the start of the worker on a busy machine.
    assert time.perf_counter() - start < 10


def test_the_call_after_a_kill_works_and_no_process_is_left():
    with opened("spin", 0.5) as reward:
        (worker,) = reward._callee.workers
        pids = [worker.pid]
        with pytest.raises(RewardError, match="took longer"):
            reward(["slow"], {})
        assert reward(["fast"], {}).scores == [0.5]
        pids.append(worker.pid)
    # Reaped as well: a zombie would still have its entry.
    assert [os.path.exists(f"/proc/{pid}") for pid in pids] == [False, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leave", r"scores:leave died with exit code 3"),
        ("crash", r"scores:crash died with signal SIGSEGV"),
        ("fail", r"(?s)scores:fail raised\nTraceback.*scores\.py.*in fail.*KeyError: 'the key'"),
        (
            "too_few",
            r"list of 2 numbers or lists of \[end, score\], one for each completion, returned 1",
        ),
        ("not_finite", r"returned nan for completion 1, 'b': rewards must be finite"),
        ("no_number", r"list of 2 numbers .*, returned None for completion 0, 'a'"),
        ("as_text", r"must return a list of 2 numbers .*, returned str: 'ab'"),
        ("mixed", r"returned both: a number for completion 1, 'b'"),
        (
            "falling",
            r"returned the step \(1, 0.5\) for completion 0, 'a': its end must be in 2 to 1",
        ),
        ("too_far", r"the step \(4, 0.5\) for completion 0, 'a': its end must be in 1 to 1"),
        ("no_pair", r"returned the step 0.5 for completion 0, 'a': wanted \[end, score\]"),
        ("infinite_step", r"returned inf for completion 0, 'a': rewards must be finite"),
        ("no_list", r"must return a list of 2 numbers .*, returned float: 1\.0"),
    ],
)
def test_what_goes_wrong_in_a_call_is_told(name, message):
    with pytest.raises(RewardError, match=message):
        call(name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent:exact", r"there is no module absent: it must be installed or lie in the current"),
        ("scores:exat", r"scores has no function 'exat': did you mean 'exact'\?"),
        ("scores:constant", r"scores has no function 'constant'"),
        ("broken:exact", r"(?s)fails to import.*No module named 'absent_dependency'"),
        ("raising:exact", r"(?s)fails to import.*ValueError: at import"),
        (
            "scores:wants",
            r"wants 'anwser', which is not a field of the data: did you mean 'answer'",
        ),
        ("scores:no_completions", r"must have a parameter named completions"),
    ],
)
def test_a_function_that_cannot_serve_is_refused_at_once(spec, message):
    with pytest.raises(RewardError, match=message):
        RewardFunction(spec, deadline_s=30, fields=["prompt", "answer"])


def test_ctrl_c_does_not_reach_the_worker():
    assert call("interrupt_me") == [1.0, 1.0]
    with opened("spin") as reward:
        assert os.getpgid(reward._callee.workers[0].pid) != os.getpgid(0)


def test_an_engine_that_forgets_to_close_still_exits(directory):
    script = directory / "forgets.py"
    script.write_text(
        "from warpo.engine.rollout.rewards.calls import Calls\n"
        "from warpo.engine.rollout.rewards.function import RewardFunction\n"
        "function = RewardFunction('scores:spin', deadline_s=30, fields=[])\n"
        "reward = Calls(function, on_error='stop', deadline_s=30)\n"
        "print(function.workers[0].pid, reward(['fast'], {}).scores)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=20
    )
    pid, rewards = result.stdout.split(maxsplit=1)
    assert (result.returncode, rewards, running(pid)) == (0, "[0.5]\n", False)


def test_workers_share_a_call_in_order():
    completions = [str(i) for i in range(7)]
    with opened("pid", workers=3) as reward:
        pids = reward(completions, {}).scores
        # a worker that is free takes the next part, neighbours all
        assert {len({*part}) for part in (pids[:2], pids[2:4], pids[4:])} == {1}
    fields = {"answer": completions}
    scores = call("exact", completions=["0", "x", *completions[2:]], fields=fields, workers=2)
    assert scores == [1.0, 0.0, *[1.0] * 5]


@pytest.mark.parametrize("workers", [1, 3])
def test_zero_scores_the_completions_that_fail(workers):
    completions = ["ab", "bad", "abc", "late", "crash", "", "abcd"]
    with opened("at_odds", 0.5, on_error="zero", workers=workers) as reward:
        scored = reward(completions, {})
    assert scored.scores == [2.0, 0.0, 3.0, 0.0, 0.0, 0.0, 4.0]
    assert scored.failed == {1, 3, 4}
    assert scored.notes == [
        "reward function scores:at_odds: 3 of 7 completions score 0; the first of them, completion "
        "1: reward function scores:at_odds raised ValueError: a bad one"
    ]


def test_zero_of_a_function_that_scores_steps_is_no_step():
    with opened("steps_at_odds", on_error="zero") as reward:
        assert reward(["ab", "bad"], {}).scores == [[(1, 1.0)], []]
        assert reward(["bad"], {}).scores == [[]]


def test_zero_takes_ten_deadlines_at_most(monkeypatch):
    monkeypatch.setattr("warpo.engine.rollout.rewards.calls.ZERO_DEADLINES", 2)
    with opened("at_odds", 0.5, on_error="zero") as reward:
        start = time.perf_counter()
        scored = reward(["a", *["late"] * 50], {})
        assert time.perf_counter() - start < 10
    assert (scored.scores, len(scored.failed)) == ([1.0] + [0.0] * 50, 50)


def test_retry_makes_failed_calls_again_and_counts_them(monkeypatch, directory):
    monkeypatch.setattr("warpo.engine.rollout.rewards.calls.RETRY_PAUSES_S", (0.01, 0.02, 0.03))
    with opened("flaky", on_error="retry") as reward:
        scored = reward(["a", "b"], {})
    assert (scored.scores, scored.retries, scored.failed) == ([1.0, 1.0], 2, set())
    assert scored.notes[1] == (
        "reward function scores:flaky raised OSError: not yet; asked again after 0.02 s"
    )
    with pytest.raises(RewardError, match="a bad one"):
        call("at_odds", completions=["bad"], on_error="retry")
    (directory / "calls").unlink()
    with pytest.raises(RewardError, match="not yet"):
        call("flaky")


def test_one_call_may_not_give_numbers_and_another_steps():
    with pytest.raises(RewardError, match="scores:by_part must return .* returned both"):
        call("by_part", completions=["a", "b"], workers=2)


def test_an_async_function_is_awaited_in_one_event_loop():
    with opened("awaited") as reward:
        assert reward(["a", "bcd"], {}).scores == [1.0, 3.0]
        assert reward(["", "ab"], {}).scores == [0.0, 2.0]


@pytest.mark.parametrize("name", ["fill", pytest.param("fill_by_torch", marks=pytest.mark.slow)])
def test_memory_has_a_limit(name):
    with pytest.raises(RewardError) as caught:
        call(name, memory_gib=8)
    assert str(caught.value) == (
        f"reward function scores:{name} needs more memory than reward.memory_gib = 8: raise it, or "
        "let the function take less"
    )


# Of each kind one; all of them are slow.
FAST = ["a child in a session of its own", "forks, and both return", "writes into the pipe"]


@pytest.mark.parametrize("name", FAST)
def test_a_hostile_function_harms_nothing(name, directory):
    assert hostile.check_function(directory, name) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*hostile.FUNCTIONS, *hostile.HARMLESS} - {*FAST}))
def test_hostile_functions_harm_nothing(name, directory):
    assert hostile.check_function(directory, name) is None


def test_nothing_outlives_an_engine_that_is_killed(directory):
    assert hostile.check_killed_engine(directory, "a daemon forked twice") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "handles SIGALRM",
        "ignores signals",
        "stops its keeper",
        "a shell that starts others",
        "leaves a process",
        "leaves a thread",
    ],
)
def test_nothing_of_a_hostile_function_outlives_an_engine_that_is_killed(name, directory):
    assert hostile.check_killed_engine(directory, name) is None
