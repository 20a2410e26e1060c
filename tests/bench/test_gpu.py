"""`make gpu` on a machine without a GPU: its steps as small programs, which die in every way that
a step or a machine can; and its real programs at tiny sizes on the CPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from warpo.bench.environment import environment
from warpo.bench.gpu import __main__ as gpu
from warpo.bench.gpu import counters, report, results, steps, table, versions
from warpo.bench.gpu.build import ROOT, SITE
from warpo.bench.gpu.goals import GOALS
from warpo.bench.gpu.runner import Runner, Step

ROWS = 4
# In place of a step: rows, each flushed and followed by some work.
STUB = f"""
import json, os, sys, time
name, out = sys.argv[1:3]
for number in range({ROWS}):
    with open(out + "/rows.jsonl", "a") as file:
        file.write(json.dumps({{"row": "stub", "name": name, "number": number, "pid": os.getpid()}}) + "\\n")
    time.sleep(0.02)
"""  # noqa: E501
# The run as `python -m warpo.bench.gpu` does it, of stubs.
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from warpo.bench.gpu import __main__ as gpu
part, out, stub = sys.argv[1:]
plan = getattr(gpu.steps, part)
gpu.steps.gpu = lambda out, device: [
    [replace(s, command=[sys.executable, "-S", "-c", stub, s.name, str(out)]) for s in stage]
    for stage in plan(out, device)
]
sys.exit(gpu.run("gpu", Path(out), "cpu", 60.0))
"""
PLANS = {"gpu": steps.gpu, "sanitize": steps.sanitize}


def stubs(plan, out):
    """The steps of a plan, each of them a stub."""
    command = [sys.executable, "-S", "-c", STUB]
    return [
        [replace(step, command=[*command, step.name, str(out)]) for step in stage]
        for stage in plan(out, "cpu")
    ]


def step(name, limit_s, code):
    return Step(name=name, limit_s=limit_s, command=[sys.executable, "-S", "-c", code])


def rows_of(out, kind):
    return [row for row in results.read(out / results.ROWS) if row["row"] == kind]


def is_alive(pid):
    """A process that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", PLANS)
def test_each_row_of_each_step_lands(name, tmp_path):
    told = []
    stages = stubs(PLANS[name], tmp_path)
    assert Runner(tmp_path, 60, tell=told.append).run(stages)
    names = [step.name for stage in stages for step in stage]
    landed = [(row["name"], row["number"]) for row in rows_of(tmp_path, "stub")]
    assert sorted(landed) == sorted((name, number) for name in names for number in range(ROWS))
    ended = rows_of(tmp_path, "step")
    assert sorted(row["name"] for row in ended) == sorted(names) and len(told) == len(names)
    assert {row["status"] for row in ended} == {"passed"}


def started(name, out):
    words = [sys.executable, "-c", RUN, name, str(out), STUB]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("row", [1, 6])
def test_a_kill_at_any_point_leaves_the_rows_until_then(row, tmp_path):
    with started("gpu", tmp_path) as process:
        wait_for(lambda: len(rows_of(tmp_path, "stub")) >= row)
        process.kill()
        before = rows_of(tmp_path, "stub")
        os.kill(before[-1]["pid"], signal.SIGKILL)  # the whole machine is gone
    wait_for(lambda: not is_alive(before[-1]["pid"]))
    lines = (tmp_path / results.ROWS).read_text().splitlines()
    assert len(lines) >= row and all(json.loads(line) for line in lines)
    names = [step.name for stage in steps.gpu(tmp_path, "cpu") for step in stage]
    wanted = [(name, number) for name in names for number in range(ROWS)]
    after = [(row["name"], row["number"]) for row in rows_of(tmp_path, "stub")]
    assert after == wanted[: len(after)]
    assert len({name for name, _ in after}) - len(rows_of(tmp_path, "step")) in (0, 1)


def test_a_run_that_is_told_to_end_takes_its_steps_along_and_shows_what_there_is(tmp_path):
    with started("sanitize", tmp_path) as process:
        wait_for(lambda: rows_of(tmp_path, "stub"))
        process.terminate()
        text, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and str(tmp_path) in text
    assert not any(is_alive(row["pid"]) for row in rows_of(tmp_path, "stub"))


def test_a_run_starts_without_what_an_earlier_one_left(tmp_path, monkeypatch):
    logs = {
        step.log for plan in PLANS.values() for stage in plan(tmp_path, "cpu") for step in stage
    }
    assert {"tests.txt", "memcheck.txt", results.LOG} <= logs
    for name in (*logs, results.ROWS, results.BENCH):
        (tmp_path / name).write_text("earlier\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name, plan in PLANS.items():
        monkeypatch.setattr(gpu.steps, name, lambda out, device, plan=plan: stubs(plan, out))
        assert gpu.run(name, tmp_path, "cpu", 60.0) == 0
    assert not any("earlier" in file.read_text() for file in tmp_path.iterdir())


def test_a_step_past_its_limit_is_ended_with_its_children_and_stops_no_other(tmp_path):
    code = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open({str(tmp_path)!r} + "/pids", "w").write(f"{{os.getpid()}} {{child.pid}}")
print("busy", flush=True); time.sleep(60)
"""
    stages = [
        [step("failing", 5, "print('no'); raise SystemExit(3)"), step("beside", 5, "")],
        [step("hanging", 0.3, code)],
        [step("missing", 5, "")],
        [step("last", 5, "print('done')")],
    ]
    stages[2] = [replace(stages[2][0], command=["/nonexistent"])]
    assert not Runner(tmp_path, 60, tell=print).run(stages)
    outcomes = {row["name"]: row["status"] for row in rows_of(tmp_path, "step")}
    assert outcomes["failing"] == "failed: status 3" and outcomes["beside"] == "passed"
    assert outcomes["hanging"] == "ended at its limit of 0.3 s" and outcomes["last"] == "passed"
    assert outcomes["missing"].startswith("failed: ") and "nonexistent" in outcomes["missing"]
    assert not any(is_alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    log = (tmp_path / results.LOG).read_text()
    assert [word in log for word in ("no", "busy", "done", "=== last")] == [True] * 4


def test_the_budget_ends_what_is_running_and_the_rest(tmp_path):
    stages = [[step("long", 60, "import time; time.sleep(60)")], [step("next", 60, "")]]
    start = time.monotonic()
    assert not Runner(tmp_path, 0.5, tell=print).run(stages)
    assert time.monotonic() - start < 5
    outcomes = [row["status"] for row in rows_of(tmp_path, "step")]
    assert outcomes == ["ended at its limit of 0.5 s", "not run: no time left"]


def test_the_limits_of_the_steps_fit_the_budget(tmp_path, monkeypatch):
    for device in ("cpu", "cuda"):
        assert sum(max(s.limit_s for s in stage) for stage in steps.gpu(tmp_path, device)) <= 480
    for exists in (True, False):
        monkeypatch.setattr(Path, "exists", lambda path, exists=exists: exists)
        plan = steps.sanitize(tmp_path, "cuda")
        assert sum(max(s.limit_s for s in stage) for stage in plan) <= steps.BUDGET_S["sanitize"]
        assert [stage[0].name for stage in plan][0] == ("triton" if exists else "build")


def test_the_programs_of_the_steps_exist(tmp_path):
    plans = [steps.gpu(tmp_path, "cuda"), steps.sanitize(tmp_path, "cuda")]
    for program in (step for plan in plans for stage in plan for step in stage):
        words = list(program.command)
        assert find_spec(words[words.index("-m") + 1]), words
    for name in steps.RUN_BY_CI:
        assert (ROOT / f"tests/kernels/{name}.py").exists()


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path)])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_wheels_are_pinned_as_the_environment_is():
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    wheels = (ROOT / "bench/gpu/requirements.txt").read_text().splitlines()
    mine = [line for line in wheels if line and not line.startswith("#")]
    assert set(mine) - set(pinned) == {"liger-kernel==0.8.5"}
    assert SITE.parent.name + "/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_small_programs_run_here(tmp_path):
    """In processes of their own: beside kernels in Triton's interpreter vLLM does not start."""
    variables = os.environ | {"WARPO_TEST_DEVICE": "cpu"}
    for words in (["smoke", "--out", str(tmp_path)], ["small_calls"]):
        command = [sys.executable, "-m", f"tests.kernels.{words[0]}", *words[1:], "--device", "cpu"]
        subprocess.run(command, cwd=ROOT, env=variables, check=True)
    rows = rows_of(tmp_path, "smoke")
    assert len(rows) > 40 and all(row["passed"] for row in rows)


def test_versions_and_counters_run_here(tmp_path):
    assert versions.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    (row,) = rows_of(tmp_path, "versions")
    assert row["torch"] == torch.__version__ and row["packages"]["pytest"] and row["commit"]
    for operation in counters.KERNELS:
        counters.launch(operation, "cpu")


def test_the_commit_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(["true"], "cpu")["commit"] == "unknown"


def test_counters_are_read_from_what_ncu_prints():
    names = ["ID", "Kernel Name", counters.METRICS["us"], counters.METRICS["read_bytes"]]
    lines = [
        "==PROF== Profiling",
        ",".join(f'"{name}"' for name in names),
        '"","","ns","byte"',
        '"0","loss(float const*, int)","1,350,000","2,489,319,424"',
    ]
    (row,) = counters.parse("\n".join(lines))
    assert row["kernel"] == "loss(float const*, int)" and row["registers"] is None
    assert row["us"] == 1350 and row["read_bytes"] == 2489319424
    assert counters.parse("==ERROR== no permission") == []


def table_of(monkeypatch, tmp_path, *words):
    """The table of two cases and one variant."""
    monkeypatch.setattr(table, "limits", lambda device, budget_s: RATES)
    monkeypatch.setitem(table.cli.BUDGET_S, "quick", 0.002)
    chosen = [g for g in GOALS if (g.operation, g.mode) in (("gae", "fwd"), ("value_loss", "fwd"))]
    monkeypatch.setattr(table, "GOALS", chosen)
    return table.main(["--out", str(tmp_path), "--device", "cpu", *words])


RATES = {"read_64MiB": 1e10, "copy_64MiB": 1e10, "exp": 1e9}
RATES |= {"matrix_float32": 1e11, "matrix_bfloat16": 1e11}


def test_the_table_has_cases_beside_their_goals_and_variants(tmp_path, monkeypatch):
    assert table_of(monkeypatch, tmp_path) == 0
    rows = list(results.read(tmp_path / results.BENCH))
    assert {row["operation"] for row in rows} == {
        *("gae", "value_loss", "policy_loss_from_hidden", "optimizer step", "packed attention")
    }
    assert all(row["command"].startswith("warpo bench gpu") and row["machine"] for row in rows)
    text = report.text(tmp_path)
    assert re.search(r"^gae +4 x 16 .* 0\.015 ", text, re.MULTILINE)
    assert re.search(r"^optimizer step +26 x 21920 +eager ", text, re.MULTILINE)
    assert [title for title, _ in table.parts("cuda", official=True)] == [
        *("gae 256 x 8192 float32 fwd", "gae 256 x 8192 float32 fwd, triton")
    ]


def test_the_table_goes_on_after_a_case_that_fails_and_one_that_breaks_the_device(
    tmp_path, monkeypatch
):
    started_again = []

    def fails(plan):
        raise RuntimeError("no")
        yield

    monkeypatch.setattr(table, "VARIANTS", (fails,))
    assert table_of(monkeypatch, tmp_path) == 1
    assert len(list(results.read(tmp_path / results.BENCH))) > 2
    monkeypatch.setattr(table, "device_is_gone", lambda device: True)
    monkeypatch.setattr(table.os, "execv", lambda *words: started_again.append(words[1][-3:]))
    table_of(monkeypatch, tmp_path)
    assert started_again == [["--failed", "--first", str(n)] for n in (1, 2, 3)]


def test_failing_tests_land_as_they_end(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("def test_good(): pass\n\ndef test_bad(): assert 1 == 2\n")
    program = steps._pytest("tests", 9, [str(file), "-n", "0"], tmp_path, "cpu")
    # the program must not take itself for a worker of this run
    own = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    variables = own | dict(program.environment)
    done = subprocess.run(program.command, env=variables, cwd=ROOT, capture_output=True)
    assert done.returncode == 1, done
    *first, last = rows_of(tmp_path, "test")
    assert last["counts"] == {"passed": 1, "failed": 1} and last["step"] == "tests"
    (failed,) = (row for row in first if "test" in row)
    assert failed["test"].endswith("test_bad") and "assert 1 == 2" in failed["problem"]
    assert "1 failed in tests" in report.text(tmp_path)


@pytest.mark.slow
def test_the_training_runs_here_end_to_end(tmp_path):
    words = ["-m", "warpo.bench.gpu.training", "--out", str(tmp_path), "--device", "cpu"]
    variables = {**os.environ, **steps.environment(ROOT, SITE)}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=variables, check=True)
    assert [(row["run"], row["step"]) for row in rows_of(tmp_path, "training")] == [
        *(("sft", 0), ("sft", 1), ("sft", 2), ("grpo", 0), ("grpo", 1))
    ]
    assert "grpo eval/accuracy" in report.text(tmp_path)
