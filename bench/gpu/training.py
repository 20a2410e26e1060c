"""The engine on the GPU, end to end: a small model imitates demonstrations, then learns by GRPO,
both with an evaluation before the first step and after the last, in bfloat16, with transformers as
the sampler. Each row of a run's metrics.jsonl is appended as it comes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from warpo.bench.gpu.build import ROOT
from warpo.bench.gpu.results import record

SFT_STEPS = {"cuda": 120, "cpu": 2}
GRPO_STEPS = {"cuda": 8, "cpu": 1}
POLL_S = 0.25
_CLI = "import sys; from warpo.engine.cli import main; sys.exit(main(sys.argv[1:]))"


class Metrics:
    """Rows of a run's metrics.jsonl that are not yet in those of results."""

    def __init__(self, run: str, path: Path, out: Path) -> None:
        self._run, self._path, self._out, self._read = run, path, out, 0

    def take(self) -> None:
        """Append the whole lines that are new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            record(self._out, "training", run=self._run, **json.loads(line))


def train(words: Sequence[str], metrics: Metrics) -> bool:
    """`warpo train WORDS`; whether it went well."""
    with subprocess.Popen([sys.executable, "-c", _CLI, "train", *words], cwd=ROOT) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            metrics.take()
        metrics.take()
    return process.returncode == 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m warpo.bench.gpu.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args(words)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        return _train_both(Path(folder), args.device, args.out)


def _train_both(folder: Path, device: str, out: Path) -> int:
    data, sft, grpo = (folder / name for name in ("data", "sft", "grpo"))
    script = [sys.executable, "examples/arithmetic.py", str(data), "--seed", "0"]
    subprocess.run(script, cwd=ROOT, check=True)
    common = ["--seed", "0", "--dtype", "bfloat16"]
    steps = SFT_STEPS[device]
    imitation = [
        *("examples/sft.yaml", *common, "--steps", str(steps), "--output_dir", str(sft)),
        *("--model", str(data / "model"), "--data.train", str(data / "warm_start.jsonl")),
        *("--data.eval", str(data / "warm_start_eval.jsonl")),
        *("--evaluation.every_steps", str(steps)),
    ]
    start = sft / f"checkpoints/step-{steps:06}"
    if not train(imitation, Metrics("sft", sft / "metrics.jsonl", out)) or not start.exists():
        start = data / "model"  # GRPO learns little from it, but shows whether it runs
    good = start != data / "model"
    steps = GRPO_STEPS[device]
    reinforcement = [
        *("examples/grpo.yaml", *common, "--steps", str(steps), "--output_dir", str(grpo)),
        *("--model", str(start), "--sampler", "transformers"),
        *("--data.train", str(data / "train.jsonl"), "--data.eval", str(data / "eval.jsonl")),
        *("--evaluation.every_steps", str(steps), "--update.warmup_steps", "1"),
    ]
    good &= train(reinforcement, Metrics("grpo", grpo / "metrics.jsonl", out))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
