"""Runs that are killed, at a random moment or at an operation on a file of output_dir, and resumed
by the same command: rows and weights must be those of the run that nothing disturbed.

`attack` takes a run of KINDS and disturbs it one to three times; `make torture` runs many seeds.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from tests.engine.runs import make_folder

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300.0
SIGNALS = {"KILL": 1, "TERM": 1, "INT": 1, "INT twice": 2, "HUP": 1}

COMMON = "output_dir: out\nsteps: {steps}\nevaluation: {{every_steps: {every}}}\n"
LANGUAGE = COMMON + "model: model\nupdate: {{lr: 1e-3, token_budget: 64}}\n"
KINDS = {
    "sft": "algorithm: sft\nbatch_size: 4\ndata: {{train: sft.jsonl, eval: sft.jsonl}}\n"
    + LANGUAGE.format(steps=6, every=2),
    "dpo": "algorithm: dpo\nbatch_size: 4\ndata: {{train: dpo.jsonl, eval: dpo.jsonl}}\n"
    + LANGUAGE.format(steps=6, every=2),
    "grpo": """algorithm: grpo
sampler: transformers
data: {{train: train.jsonl, eval: eval.jsonl}}
reward: {{sources: "token_rewards:low", deadline_s: 60}}
rollout: {{prompts_per_step: 3, group_size: 4, max_new_tokens: 6, max_model_len: 64}}
loss: {{kl_coef: 0.01, reference_every_steps: 2}}
"""
    + LANGUAGE.format(steps=4, every=2),
    "sac": """algorithm: sac
environment: Pendulum-v1
sac: {{learning_starts: 16, batch_size: 8, hidden_size: 8, steps_per_row: 16, buffer_size: 64}}
"""
    + COMMON.format(steps=96, every=48),
}

# Counts what the process does to files of output_dir, and kills it before the chosen one.
HOOK = """
import os, signal, sys
place, at = os.environ["TORTURE_OUT"], int(os.environ["TORTURE_AT"])
seen = 0

def count():
    global seen
    seen += 1
    if seen == at:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        path = args[0]
        if isinstance(path, (str, os.PathLike)) and place in os.path.abspath(os.fspath(path)):
            count()

fsync = os.fsync

def counted_fsync(descriptor):
    count()
    fsync(descriptor)

os.fsync = counted_fsync
sys.addaudithook(watch)
"""
# of a whole run, about: opening, rows and two or three checkpoints
OPERATIONS = 120


def attack(seed: int, folder: Path) -> str | None:
    """Disturb a run in the empty folder, and let it end.

    Returns:
        None where it ended as the run that nothing disturbed; else what is different.
    """
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    shutil.copytree(_whole(kind), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    every = ("--checkpoint.every_steps", str(rng.choice((0, 1, 2) if kind != "sac" else (0, 16))))
    story, twice = [], False
    for _ in range(rng.randint(1, 3)):
        name, trouble = _disturb(folder, every, rng)
        story.append(name)
        twice = twice or "INT twice" in name
        if trouble:
            return f"{kind}, {', '.join(every)}, {'; '.join(story)}: {trouble}"
    code, said = _finish(_start(folder, every))
    told = f"{kind}, {' '.join(every)}, {'; '.join(story)}"
    if code:
        return f"{told}: the last run ended with {code}: {said[-500:]}"
    different = difference(_whole(kind) / "out", folder / "out", twice)
    return f"{told}: {different}" if different else None


def difference(whole: Path, other: Path, twice: bool) -> str | None:
    """Name the differences of two ended runs.

    Args:
        twice: a second Ctrl-C has ended the process at once, so that the row of the step which it
            had reached may lack metrics.
    """
    wanted, found = _rows(whole), _rows(other)
    if [row["step"] for row in found] != [row["step"] for row in wanted]:
        return f"rows of steps {[row['step'] for row in found]}"
    for mine, theirs in zip(found, wanted, strict=True):
        names = mine.keys() if twice else theirs.keys() | mine.keys()
        for name in names:
            if mine.get(name) != theirs.get(name):
                return f"{name} of step {mine['step']}: {mine.get(name)}, not {theirs.get(name)}"
    ends = [_newest(folder) for folder in (whole, other)]
    tensors = [json.loads((end / "manifest.json").read_text())["tensors"] for end in ends]
    for described in tensors:
        # NumPy's generator starts from the entropy of the process, and no run draws from it
        del described["trainer.pt/random/numpy/1"]
    if ends[0].name != ends[1].name or tensors[0] != tensors[1]:
        names = [name for name in tensors[0] if tensors[0][name] != tensors[1].get(name)]
        return f"{ends[1].name} has other tensors: {names[:3]}"
    hidden = [path.name for path in (other / "checkpoints").glob(".*")]
    return f"{hidden} are left" if hidden else None


def _disturb(folder: Path, every: tuple[str, ...], rng: random.Random) -> tuple[str, str | None]:
    """Start a run and end it early; how, and what was wrong with it."""
    if rng.random() < 0.5:
        at = rng.randint(1, OPERATIONS)
        code, said = _finish(_start(folder, every, at))
        trouble = None if code in (0, -signal.SIGKILL) else f"ended with {code}: {said[-500:]}"
        return f"killed at operation {at}", trouble
    name = rng.choice(list(SIGNALS))
    rows = rng.randint(-1, 5)
    process = _start(folder, every)
    metrics = folder / "out/metrics.jsonl"
    deadline = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        if rows < 0 or (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
            break
        time.sleep(0.02)
    time.sleep(rng.random() * (5.0 if rows < 0 else 0.5))
    for _ in range(SIGNALS[name]):
        process.send_signal(getattr(signal, f"SIG{name.split()[0]}"))
        time.sleep(rng.random() * 0.3)
    code, said = _finish(process)
    # a signal ends Python itself until the run has begun to listen
    number = getattr(signal, f"SIG{name.split()[0]}")
    wrong = code not in (0, 1, 130, -number) or (code == 1 and "KeyboardInterrupt" not in said)
    told = f"{name} after {rows} rows"
    return told, f"ended with {code}: {said[-500:]}" if wrong else None


def _start(folder: Path, every: tuple[str, ...], at: int = 0) -> subprocess.Popen[str]:
    hook = folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK if at else "")
    return subprocess.Popen(
        [sys.executable, "-m", "warpo.engine.cli", "train", "config.yaml", "--resume", *every],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(hook), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        | {"TORTURE_OUT": str(folder.resolve() / "out"), "TORTURE_AT": str(at)},
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        return 124, said
    return process.returncode, said


@cache
def _whole(kind: str) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_folder(folder)
    rows = [(f"t{i} t{40 - i} t7 ", f"t{20 + i} t{i + 9}", f"t{30 - i}") for i in range(3, 12)]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c, _ in rows]
    (folder / "sft.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows]
    (folder / "dpo.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(KINDS[kind].replace("{{", "{").replace("}}", "}"))
    code, said = _finish(_start(folder, ()))
    assert code == 0, said
    return folder


def _rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("perf/")}
        for line in lines
    ]


def _newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*"))
