"""The examples as a user runs them, `warpo train`: in a process of its own, or of many in this one,
which loads torch and vLLM once.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.examples.configs import EXAMPLES, config_of
from warpo.engine import cli
from warpo.engine.run.log import read_rows

# A busy machine of 2 cores; alone on it the slowest takes a third.
SECONDS = 300


def prepare(folder: Path, seed: int = 0) -> Path:
    """The arithmetic task and the checkpoint of sft.yaml, where the other examples start."""
    (folder / "examples").symlink_to(EXAMPLES)
    make = [sys.executable, "examples/arithmetic.py", "runs/arithmetic", "--seed", str(seed)]
    subprocess.run(make, cwd=folder, check=True, capture_output=True)
    train(folder, "sft", "--evaluation.every_steps", "0")
    return folder


def train(folder: Path, algorithm: str, *overrides: str) -> list[dict]:
    """Run an algorithm in a folder, in a process of its own; its rows of metrics."""
    start = time.monotonic()
    command = [sys.executable, "-m", "warpo.engine.cli", *_words(algorithm, overrides)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert time.monotonic() - start < SECONDS, result.stdout[-2000:]
    return _rows(folder, algorithm)


def train_here(folder: Path, algorithm: str, *overrides: str) -> list[dict]:
    """Run an algorithm in a folder, in this process; its rows of metrics."""
    with contextlib.chdir(folder):
        assert cli.main(_words(algorithm, overrides)) == 0
    return _rows(folder, algorithm)


def _words(algorithm: str, overrides: Sequence[str]) -> list[str]:
    path, words = config_of(algorithm)
    return ["train", str(path), *words, *overrides]


def _rows(folder: Path, algorithm: str) -> list[dict]:
    (metrics,) = (folder / "runs").glob(f"**/{algorithm}/metrics.jsonl")
    return read_rows(metrics)


def evaluations(rows: list[dict], metric: str) -> list[float]:
    """A metric of the evaluations, in their order."""
    return [row[metric] for row in rows if metric in row]
