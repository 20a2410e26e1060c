"""The arithmetic task with few examples, and runs of the configs in examples/ on it."""

from __future__ import annotations

import json
from pathlib import Path

from examples import arithmetic
from warpo.engine.config_file import read_tree
from warpo.engine.offline.config import OfflineConfig
from warpo.engine.offline.train import run

EXAMPLES = Path(__file__).parents[3] / "examples"
NUM_EXAMPLES = 512


def make_task(folder: Path) -> Path:
    """Model and data, the files cut to NUM_EXAMPLES lines."""
    arithmetic.write(folder, 0)
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:NUM_EXAMPLES]))
    return folder


def read_example(name: str, folder: Path, out: Path, *overrides: str) -> OfflineConfig:
    """examples/<name>.yaml with its paths moved from runs/arithmetic to `folder`."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    text = text.replace("runs/arithmetic/sft/checkpoints/step-000300", str(folder / "start"))
    text = text.replace(f"output_dir: runs/arithmetic/{name}", f"output_dir: {out}")
    path = out.with_suffix(".yaml")
    path.write_text(text.replace("runs/arithmetic", str(folder)))
    return read_tree(OfflineConfig, path, overrides)


def train(name: str, folder: Path, out: Path, *overrides: str) -> list[dict]:
    """Run an example in this process; its rows without timings."""
    run(read_example(name, folder, out, *overrides))
    return rows(out)


def rows(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines
    ]
