import dataclasses
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from warpo.engine.config.policy import Config
from warpo.engine.errors import CheckpointError
from warpo.engine.run import log as metrics
from warpo.engine.run.columns import COLUMNS
from warpo.engine.run.log import RunLog, read_rows
from warpo.engine.run.plot import plot_run

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
STEP = {c.metric: 0.5 for c in COLUMNS[1:] if not c.metric.startswith("perf/")}


@pytest.fixture
def config():
    return Config(
        model="models/tiny",
        output_dir="o",
        steps=3,
        data={"train": "t.jsonl"},
        reward={"sources": ["a:b"]},
    )


@pytest.fixture
def open_log(tmp_path, config):
    def open_with(resume_step=None, width=120, terminal=False):
        console = Console(
            file=io.StringIO(), width=width, force_terminal=terminal, _environ={"TERM": "xterm"}
        )
        return RunLog(tmp_path / "run", config, resume_step=resume_step, console=console)

    return open_with


def shown(log):
    return log._console.file.getvalue()


def test_rows_between_those_shown_are_written_all_the_same(tmp_path, config):
    console = Console(file=io.StringIO(), width=200)
    with RunLog(tmp_path, config, console=console, shown_every=10) as log:
        for step in range(1, 21):
            log.write(step, {"reward/mean": 0.5} | ({"eval/accuracy": 1.0} if step == 7 else {}))
    shown = [line.split()[0] for line in console.file.getvalue().splitlines()]
    assert shown == ["step", "7", "10", "20"]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 21))


def test_a_step_becomes_a_json_row_a_tensorboard_point_and_a_table_row(open_log, tmp_path):
    with open_log() as log:
        with log.phase("sample") as progress:
            progress(1, 2)
        with log.phase("update"), log.phase("update"):
            pass
        log.write(1, STEP | {"perf/tokens": 1000, "loss/policy": torch.tensor(0.25)})
        assert "loss/policy" in (tmp_path / "run" / "metrics.jsonl").read_text()  # flushed
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert (row["step"], row["reward/mean"], row["loss/policy"]) == (1, 0.5, 0.25)
    assert row["perf/step_s"] >= row["perf/sample_s"] + row["perf/update_s"] / 2 > 0
    assert row["perf/tokens_per_s"] == pytest.approx(1000 / row["perf/step_s"])
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss/policy")] == [(1, 0.25)]
    head, body = shown(log).splitlines()
    assert re.split("  +", head.strip()) == [column.long for column in COLUMNS]
    assert body.split()[:5] == ["1", "0.5000", "0.500", "0.500", "0.500"]


def test_a_pipe_gets_rows_and_no_control_codes(open_log):
    with open_log(width=40) as log:
        for step in range(1, 4):
            with log.phase("sample"):
                log.write(step, STEP)
    assert "\x1b" not in shown(log) and "\r" not in shown(log)
    assert [line.split()[0] for line in shown(log).splitlines()] == ["step", "1", "2", "3"]


def test_a_terminal_has_a_live_line_above_which_rows_stay(open_log):
    with open_log(terminal=True) as log:
        with log.phase("sample") as progress:
            progress(3, 8)
            log._live.refresh()
        log.write(1, STEP)
    text = shown(log)
    assert "\x1b" in text and "sample" in text and "3/8" in text
    assert re.search(r"\b1 +0\.5000", CONTROL.sub("", text))


@pytest.mark.parametrize(
    ("width", "columns", "last"), [(60, 8, "KL"), (80, 11, "clip"), (140, 12, "tokens/s")]
)
def test_the_table_fits_its_terminal(open_log, width, columns, last):
    with open_log(width=width, terminal=True) as log:
        lines = log._table.lines(
            {"step": 99999} | STEP | {"perf/tokens_per_s": 1, "perf/step_s": 1}
        )
    assert len(log._table._cells) == columns
    assert lines[0].endswith(last)
    assert max(len(line) for line in lines) <= width


def test_a_run_that_does_not_learn_is_warned_of_once_by_all_its_processes(open_log):
    equal = STEP | {"reward/degenerate_frac": 1.0}
    with open_log() as log:
        for step in range(1, 9):
            log.write(step, equal)
    assert "warning" not in shown(log)
    with open_log(resume_step=8) as log:
        for step in range(9, 20):
            log.write(step, equal)
    lines = shown(log).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("warning: since step 1 all ")]
    assert lines[at - 1].split()[0] == "10"


def test_completions_are_shown_on_a_terminal_without_its_control_codes(open_log):
    with open_log(terminal=True, width=60) as log:
        assert log.is_watched
        log.show("step 3:", "a[b]\x1b[2J", [(1.0, "right\n"), (0.0, "wrong")])
    text = CONTROL.sub("", shown(log))
    assert "prompt    a[b]\\x1b[2J" in text
    assert "reward 1  right\\n" in text and "reward 0  wrong" in text
    with open_log() as log:
        assert not log.is_watched


def test_columns_without_a_value_stay_empty(open_log):
    with open_log() as log:
        first = log._table.lines({"step": 1, "reward/mean": 1.0, "ratio/clip_frac": 2.0})[1]
        second = log._table.lines({"step": 2} | STEP)[0]
    assert first.split() == ["1", "1.0000", "2.0000"]
    assert first.index("2.0000") == second.rindex("0.5000")


def test_a_value_that_is_not_finite_is_null_in_the_file_and_told_on_the_screen(open_log, tmp_path):
    with open_log() as log:
        log.write(1, {"kl/mean": float("nan"), "reward/mean": float("inf")})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["kl/mean"], row["reward/mean"]) == (None, None)
    assert "nan" in shown(log) and "inf" in shown(log)


def test_resuming_drops_the_rows_after_the_checkpoint(open_log, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with open_log() as log:
        for step in range(1, 6):
            log.write(step, {"reward/mean": step})
    with path.open("a") as file:
        file.write('{"step": 6, "rew')  # killed in the middle of a line
    with open_log(resume_step=3) as log:
        log.write(4, {"reward/mean": 40})
    assert [(row["step"], row["reward/mean"]) for row in read_rows(path)] == [
        *((1, 1), (2, 2), (3, 3), (4, 40))
    ]


def test_a_run_that_resumes_before_its_first_step_keeps_row_0(open_log, tmp_path):
    with open_log() as log:
        log.write(0, {"eval/accuracy": 0.25})
        log.write(1, STEP)
    with open_log(resume_step=0):
        pass
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0]


def test_counts_join_the_next_row(open_log, tmp_path):
    with open_log() as log:
        log.count("reward/failed", 2)
        log.count("reward/failed", 1)
        assert log.write(1, {})["reward/failed"] == 3.0
        assert "reward/failed" not in log.write(2, {})


def test_the_clock_of_a_step_leaves_out_what_came_before(open_log):
    with open_log() as log:
        with log.phase("load"):
            time.sleep(0.2)
        log.start_step()
        with log.phase("sample"):
            pass
        row = log.write(1, STEP)
    assert row["perf/step_s"] < 0.2 <= row["perf/load_s"]


def test_rows_of_a_run_without_a_checkpoint_are_kept_beside_those_of_the_next(open_log, tmp_path):
    with open_log() as log:
        log.write(1, STEP)
    with open_log() as log:
        log.write(7, STEP)
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [7]
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl.old")] == [1]


def test_an_evaluation_is_added_to_the_row_that_lacks_it(open_log, tmp_path):
    with open_log() as log:
        log.write(0, {"eval/accuracy": 0.25})
        log.write(1, {"kl/mean": float("nan"), "reward/mean": 1.0})
    with open_log(resume_step=1) as log:
        assert log.is_evaluated(0) and not log.is_evaluated(1)
        log.add(1, {"eval/accuracy": 0.5})
        log.write(2, STEP)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (rows[1]["reward/mean"], rows[1]["kl/mean"]) == (1.0, None)
    assert rows[1]["eval/accuracy"] == 0.5
    with open_log() as log:
        log.add(0, {"eval/accuracy": 0.25})
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [0]


def test_settings_that_a_resumed_run_changes_are_kept(open_log, config, tmp_path):
    with open_log():
        pass
    first = (tmp_path / "run/config.yaml").read_text()
    with open_log(resume_step=2):
        pass
    assert not list((tmp_path / "run").glob("config-step-*"))
    changed = dataclasses.replace(config, steps=9, resume=True)
    RunLog(tmp_path / "run", changed, resume_step=2).__exit__(None, None, None)
    assert (tmp_path / "run/config-step-000002.yaml").read_text() == first
    assert "steps: 9" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize("reader", ["pipe", "terminal"])
def test_a_run_goes_on_where_the_reader_of_its_table_has_gone(reader):
    code = (
        "import signal, sys\n"
        "from rich.progress import Progress\n"
        "from warpo.engine.run.terminal import OutputConsole\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "console = OutputConsole()\n"
        "with Progress(console=console) as live:\n"
        "    for step in range(200):\n"
        "        live.remove_task(live.add_task('a phase'))\n"
        "        console.print('a row of the table')\n"
        "print('went on', file=sys.stderr)\n"
    )
    ours, its = pty.openpty() if reader == "terminal" else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=its,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(its)
    os.close(ours)
    assert process.stderr.read() == "went on\n"
    assert process.wait() == 0


def test_a_damaged_file_is_refused_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not JSON"):
        read_rows(path)
    for line in ("5", "[1]", '{"stap": 1}', '{"step": "x"}'):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a row of metrics"):
            read_rows(path)


def test_phases_work_without_nvtx(open_log, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with open_log() as log, log.phase("sample"):
        pass
    assert log._seconds["perf/sample_s"] > 0


def test_a_phase_has_the_seconds_of_what_it_gave_a_gpu_and_no_others(open_log, monkeypatch):
    given: list[float] = []

    def finish():
        time.sleep(given.pop() if given else 0)

    monkeypatch.setattr(metrics, "finish_device_work", finish)
    with open_log() as log:
        given.append(0.05)
        with log.phase("sample"):
            pass
        with log.phase("update"):
            given.append(0.05)
        row = log.write(1, {})
    assert row["perf/sample_s"] < 0.04 and row["perf/update_s"] >= 0.05


def test_a_phase_that_fails_leaves_the_live_line_clean(open_log):
    with open_log(terminal=True) as log:
        with pytest.raises(ZeroDivisionError), log.phase("sample"):
            1 / 0  # noqa: B018
        assert log._live.tasks == []


def test_the_picture_is_drawn_from_the_files_of_the_run(open_log, tmp_path):
    with open_log() as log:
        for step in range(1, 31):
            extra = {"eval/accuracy": 0.5} if step % 10 == 0 else {}
            log.write(step, {"reward/mean": step / 30, "kl/mean": float("nan")} | extra)
    picture = plot_run(tmp_path / "run" / "metrics.jsonl")
    content = picture.read_bytes()
    assert picture.name == "learning.png" and content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1400, 800)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        plot_run(tmp_path / "empty.jsonl")
