"""State of a run's output_dir, and when it is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.torture.checkpoints import make
from warpo.engine.config.sections import CheckpointSettings
from warpo.engine.errors import ConfigError
from warpo.engine.run import loop
from warpo.engine.run.log import NoLog, RunLog
from warpo.engine.run.loop import Checkpoints, Contents, Progress, Run, signals
from warpo.engine.run.resume import changes, claim, is_complete, tell

LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.write("process 77 on elsewhere")
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
except BlockingIOError:
    file.seek(0)
    print(file.read())
"""


@dataclass(frozen=True)
class Settings:
    output_dir: str
    resume: bool = False
    steps: int = 4
    seed: int = 0
    loss: dict[str, Any] = field(default_factory=lambda: {"kl_coef": 0.1})


@dataclass(frozen=True)
class SavedSettings(Settings):
    checkpoint: CheckpointSettings = CheckpointSettings()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(output_dir=str(tmp_path / "out"))


def lock(settings: Settings) -> subprocess.Popen[str]:
    """A process that holds the directory, or says who does."""
    return subprocess.Popen(
        [sys.executable, "-c", LOCK, str(Path(settings.output_dir) / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said_of(settings: Settings, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with claim(settings) as saved, RunLog(settings.output_dir, settings) as log:
        tell(settings, saved, log)
    return capsys.readouterr().out.splitlines()


def test_two_runs_at_once_are_refused_until_the_first_has_ended(settings: Settings) -> None:
    with claim(settings):
        other = lock(settings)
        assert f"process {os.getpid()} on " in other.communicate()[0]
    other = lock(settings)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="out is in use by .*process 77 on elsewhere: wait"):
        claim(settings).__enter__()
    other.kill()
    other.communicate()
    with claim(settings) as saved:
        assert saved is None


@pytest.mark.parametrize("kind", ["a file", "in a file", "dangling", "too long", "no disk"])
def test_an_output_dir_that_cannot_be_made_is_named(
    settings: Settings, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "absent" / "target")
    folder = {
        "a file": tmp_path / "file",
        "in a file": tmp_path / "file" / "run",
        "dangling": tmp_path / "link",
        "too long": tmp_path / ("x" * 300),
        "no disk": "/proc/run",
    }[kind]
    with pytest.raises(ConfigError, match=f"output_dir = {folder}: .*: choose a folder that can"):
        claim(replace(settings, output_dir=str(folder))).__enter__()


def test_a_run_without_a_checkpoint_begins_anew_with_and_without_resume(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for resume in (True, False, True):
        started = replace(settings, resume=resume)
        said = said_of(started, capsys)
        anew = f"{settings.output_dir} holds no checkpoint: the run starts anew"
        assert said == ([anew] if resume else [])


def test_a_resumed_run_tells_what_has_changed_and_refuses_what_cannot(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path(settings.output_dir))  # with settings = {"steps": 4, "seed": 0}
    with pytest.raises(ConfigError, match="with a checkpoint, step-000004: pass --resume to con"):
        claim(settings).__enter__()
    resumed = replace(settings, resume=True)
    with pytest.raises(ConfigError, match="seed = 5, but the run in .*out has seed = 0: it cannot"):
        claim(replace(resumed, seed=5)).__enter__()
    said = said_of(replace(resumed, steps=9), capsys)
    assert "changed since step 4: steps: 4 -> 9" in said
    said = said_of(replace(resumed, steps=3), capsys)
    assert said[-1] == (
        "the run is complete: step-000004 is saved and steps = 3; raise steps to go on"
    )
    with claim(resumed) as saved:
        assert is_complete(resumed, saved) and not is_complete(replace(resumed, steps=5), saved)


def test_changes_are_named_by_key() -> None:
    before = {"a": 1, "loss": {"kl": 0.1, "clip": [1, 2]}, "gone": 3}
    after = {"a": 1, "loss": {"kl": 0.2, "clip": [1, 2]}, "new": 4}
    assert changes(before, after) == [
        "gone: 3 -> absent",
        "loss.kl: 0.1 -> 0.2",
        "new: absent -> 4",
    ]


def test_a_checkpoint_is_due_by_steps_or_by_minutes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, progress = [0.0], Progress()
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def checkpoints(**section: Any) -> Checkpoints:
        config = SavedSettings(
            settings.output_dir, steps=9, checkpoint=CheckpointSettings(**section)
        )
        return Checkpoints(config, Run(log=NoLog()), progress, Contents(parts={}, check=bool))

    def due(of: Checkpoints, *steps: int) -> list[bool]:
        found = []
        for progress.step in steps:
            found.append(of.is_due())
        return found

    made = checkpoints()
    assert made.saved is None and due(made, 1, 5, 9) == [False, False, True]
    now[0] = 30 * 60
    assert due(made, 1) == [True]
    made.save()
    assert made.saved == 1 and due(made, 2) == [False]
    never = checkpoints(every_minutes=0, every_steps=2)
    now[0] = 1e9
    assert due(never, 1, 2, 3) == [False, True, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_once_and_then_interrupts(settings: Settings, number: int) -> None:
    with RunLog(settings.output_dir, settings) as log, signals(log) as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_run_under_nohup_does_not_hear_its_terminal(settings: Settings) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RunLog(settings.output_dir, settings) as log, signals(log) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_of_a_fingerprint_is_that_of_reading(tmp_path: Path) -> None:
    """A quick guard of a slow mistake: hashing 40 MB by hashlib takes a second on a busy core."""
    from warpo.engine.run import manifest

    file = tmp_path / "weights"
    file.write_bytes(torch.zeros(10_000_001).numpy().tobytes()[:-1])
    text = manifest._bytes(file)
    assert text.startswith("40000003 bytes ") and text.endswith("000000")
