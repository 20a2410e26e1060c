import os
import subprocess
import sys
import time
from contextlib import closing

import pytest

from warpo.engine.errors import RewardError
from warpo.engine.rewards.calls import Calls
from warpo.engine.rewards.function import RewardFunction

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

def sleep_in_c(completions):
    time.sleep(100)

def hold_the_gil(completions):
    return [float(sum(range(10**13)))]

def start_a_child(completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    open("child.pid", "w").write(str(child.pid))
    time.sleep(100)

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


@pytest.mark.parametrize("name", ["spin", "sleep_in_c", "hold_the_gil"])
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
        (worker,) = reward._source.workers
        pids = [worker.pid]
        with pytest.raises(RewardError, match="took longer"):
            reward(["slow"], {})
        assert reward(["fast"], {}).scores == [0.5]
        pids.append(worker.pid)
    # Reaped as well: a zombie would still have its entry.
    assert [os.path.exists(f"/proc/{pid}") for pid in pids] == [False, False]


def test_the_kill_takes_the_children_of_the_function_along(directory):
    with pytest.raises(RewardError, match="took longer"):
        call("start_a_child", deadline_s=1.0)
    pid = int((directory / "child.pid").read_text())
    time.sleep(0.1)
    assert not running(pid)


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
        ("scores:wants", r"wants 'anwser', which is no field of the data: did you mean 'answer'"),
        ("scores:no_completions", r"must have a parameter named completions"),
    ],
)
def test_a_function_that_cannot_serve_is_refused_at_once(spec, message):
    with pytest.raises(RewardError, match=message):
        RewardFunction(spec, deadline_s=30, fields=["prompt", "answer"])


def test_ctrl_c_does_not_reach_the_worker():
    assert call("interrupt_me") == [1.0, 1.0]
    with opened("spin") as reward:
        assert os.getpgid(reward._source.workers[0].pid) != os.getpgid(0)


def test_an_engine_that_forgets_to_close_still_exits(directory):
    script = directory / "forgets.py"
    script.write_text(
        "from warpo.engine.rewards.calls import Calls\n"
        "from warpo.engine.rewards.function import RewardFunction\n"
        "function = RewardFunction('scores:spin', deadline_s=30, fields=[])\n"
        "reward = Calls(function, on_error='stop', deadline_s=30)\n"
        "print(function.workers[0].pid, reward(['fast'], {}).scores)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=20
    )
    pid, rewards = result.stdout.split(maxsplit=1)
    assert (result.returncode, rewards, running(pid)) == (0, "[0.5]\n", False)
