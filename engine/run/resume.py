"""State of a run's output_dir: another run at work, or a checkpoint to resume from."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from warpo.engine.errors import ConfigError
from warpo.engine.run import checkpoint
from warpo.engine.run.checkpoint import Saved
from warpo.engine.run.log import Log, Settings, plain

# What the states of a checkpoint depend on. The number of steps is free, as is what loss, update
# and rewards read: the rows of metrics.jsonl after the step are then of the new settings.
FIXED = (
    *("algorithm", "dtype", "seed", "environment", "num_envs"),
    *("lora.rank", "lora.alpha", "lora.targets"),
)


class RunSettings(Settings, Protocol):
    """The root of a tree of settings."""

    @property
    def output_dir(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    @property
    def steps(self) -> int: ...


@contextmanager
def claim(config: RunSettings) -> Iterator[Saved | None]:
    """Hold output_dir for this process; yields the checkpoint to resume from, or None where the run
    begins.

    Raises:
        ConfigError: another process holds it, it has a checkpoint and `resume` is not set, or a
            setting is not that of the checkpoint and cannot be changed.
        CheckpointError: the newest checkpoint is damaged.
    """
    with _lock(Path(config.output_dir)):
        newest = checkpoint.latest(config.output_dir)
        if newest is not None and not config.resume:
            raise ConfigError(
                f"output_dir = {config.output_dir} holds a run with a checkpoint, {newest.name}: "
                "pass --resume to continue it, or choose another output_dir"
            )
        saved = checkpoint.open_latest(config.output_dir)
        if saved is not None:
            _check_fixed(config, saved)
        yield saved


def tell(config: RunSettings, saved: Saved | None, log: Log) -> None:
    """Say how the run begins, and each setting that is not that of the checkpoint."""
    if saved is None:
        if config.resume:
            log.say(f"{config.output_dir} holds no checkpoint: the run starts anew")
        return
    for line in changes(saved.settings, plain(config)):
        log.say(f"changed since step {saved.step}: {line}")
    if saved.step >= config.steps:
        log.say(
            f"the run is complete: {saved.path.name} is saved and steps = {config.steps}; raise "
            "steps to go on"
        )


def is_complete(config: RunSettings, saved: Saved | None) -> bool:
    return saved is not None and saved.step >= config.steps


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` of each setting that differs, sections included."""
    lines = []
    for name in before.keys() | after.keys():
        old, new = before.get(name, "absent"), after.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old} -> {new}")
    return sorted(lines)


def _check_fixed(config: RunSettings, saved: Saved) -> None:
    now = plain(config)
    for name in FIXED:
        old, new = _value(saved.settings, name), _value(now, name)
        # an older version of warpo has saved no setting that it had not
        if old != new and old != "absent":
            raise ConfigError(
                f"{name} = {new}, but the run in {config.output_dir} has {name} = {old}: it cannot "
                "be changed by --resume: set it back, or choose another output_dir"
            )


def _value(settings: Mapping[str, Any], name: str) -> Any:
    """That of a dotted name; "absent" where there is no such setting."""
    section, dot, leaf = name.rpartition(".")
    return (settings.get(section, {}) if dot else settings).get(leaf, "absent")


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold a directory until this process ends or leaves; the kernel lets go after kill -9.

    A record lock belongs to the process: what it has forked does not hold it after its end.
    """
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output_dir = {directory}: {error.strerror}: choose a folder that can be written"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"output_dir = {directory} is in use by {_owner(file)}: wait until it has ended, "
                "stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"output_dir = {directory} is on a file system without locks ({error.strerror}): "
                "choose another output_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "another run"
