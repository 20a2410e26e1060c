"""The examples as a user runs them: `warpo train`, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.examples.configs import EXAMPLES, config_of
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
    """Run an algorithm in a folder; its rows of metrics."""
    start = time.monotonic()
    path, words = config_of(algorithm)
    command = [sys.executable, "-m", "warpo.engine.cli", "train", str(path), *words, *overrides]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert time.monotonic() - start < SECONDS, result.stdout[-2000:]
    (metrics,) = (folder / "runs").glob(f"**/{algorithm}/metrics.jsonl")
    return read_rows(metrics)


def evaluations(rows: list[dict], metric: str) -> list[float]:
    """A metric of the evaluations, in their order."""
    return [row[metric] for row in rows if metric in row]
