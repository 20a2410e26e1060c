"""The arithmetic task with few examples, and runs of the examples on it."""

from __future__ import annotations

import json
from pathlib import Path

from examples import arithmetic
from tests.examples.configs import config_of
from warpo.engine.config.file import read_tree
from warpo.engine.config.offline import OfflineConfig
from warpo.engine.trainers.offline.train import run

NUM_EXAMPLES = 512


def make_task(folder: Path) -> Path:
    """Model and data, the files cut to NUM_EXAMPLES lines."""
    arithmetic.write(folder, 0)
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:NUM_EXAMPLES]))
    return folder


def read_example(algorithm: str, folder: Path, out: Path, *overrides: str) -> OfflineConfig:
    """The example's config with its paths moved from runs/arithmetic to `folder`."""

    def moved(text: str) -> str:
        text = text.replace("runs/arithmetic/sft/checkpoints/step-000300", str(folder / "start"))
        return text.replace("runs/arithmetic", str(folder))

    path, words = config_of(algorithm)
    copy = out.with_suffix(".yaml")
    copy.write_text(moved(path.read_text()))
    words = [*map(moved, words), "--output_dir", str(out)]
    return read_tree(OfflineConfig, copy, [*words, *overrides])


def train(algorithm: str, folder: Path, out: Path, *overrides: str) -> list[dict]:
    """Run an example in this process; its rows without timings."""
    run(read_example(algorithm, folder, out, *overrides))
    return rows(out)


def rows(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines
    ]
