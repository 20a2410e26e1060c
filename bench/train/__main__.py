"""Time a GRPO step of warpo beside one of TRL's GRPOTrainer: same model, data, batch, lengths and
vLLM, on the CPU.

    make bench-train, or, where `make peers` has been run: python -m warpo.bench.train --out DIR

Each run is a process of its own; the trainers take turns. Prints a table by phase and the goals.
Writes OUT/train.jsonl, one row for each model and trainer, with machine, versions, date and
command. TRL is measured as it is installed, with its correction for the sampler's logprobs, and
tuned: without that correction, and so without the phase "score", and with the settings of threads
and malloc that `warpo train` makes for itself. The goals compare with both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from warpo.bench.environment import aligned, environment, processor
from warpo.bench.train import trl_side, warpo_side
from warpo.bench.train.job import MODELS, Job, make
from warpo.engine.environment import set_thread_waiting

PHASES = (
    "sample", "reward", "score", "forward", "backward", "optimizer", "publish", "probe", "other"
)  # fmt: skip
# Of the same model and tokens: a step may take this share of the time of TRL's, and its peak is to
# be lower by so many copies of the weights.
TIME_GOAL, WEIGHTS_GOAL = 0.5, 1.0

# Timed steps of a process and prompts of a step, so that the command ends within minutes.
STEPS = {"tiny": 8, "20m": 3, "32k": 3, "100m": 2}
PROMPTS = {"tiny": 8, "20m": 4, "32k": 4, "100m": 2}

# Prints the resident bytes of a process that has imported these modules and done nothing else.
_IMPORT = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1:]: importlib.import_module(name)
from warpo.bench.train.job import memory_bytes
print(memory_bytes("VmRSS"))
"""


class Side(NamedTuple):
    """A trainer: the module that runs the job on it, with arguments, what that imports, and whether
    its process gets the settings of `warpo train`.
    """

    module: str
    imports: Sequence[str]
    arguments: Sequence[str] = ()
    tuned: bool = True


SIDES = {
    "warpo": Side("warpo.bench.train.warpo_side", warpo_side.IMPORTS),
    "trl": Side("warpo.bench.train.trl_side", trl_side.IMPORTS, ["--correction"], tuned=False),
    "trl tuned": Side("warpo.bench.train.trl_side", trl_side.IMPORTS),
}


def child(arguments: Sequence[str], peers: Path | None, log: Path, tuned: bool = True) -> str:
    """Standard output of a Python process, all of which goes to `log` as well.

    Raises:
        RuntimeError: it failed; with the end of its log.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    path = [str(peers)] if peers else []
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    variables = settings | os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    if tuned:
        # as `keep_freed_memory` does in the process
        variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        set_thread_waiting(variables)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=variables, stdout=subprocess.PIPE, stderr=file, text=True, check=False,
        )  # fmt: skip
        file.write(done.stdout)
    if done.returncode:
        end = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-12:])
        raise RuntimeError(
            f"{' '.join(map(str, arguments[:3]))} ended with status {done.returncode}; TRL is "
            f"installed by `make peers`; the end of {log}:\n{end}"
        )
    return done.stdout


def measure(job: Job, sides: Sequence[str], rounds: int, peers: Path) -> dict[str, dict]:
    """What each side reports, its steps joined over the rounds; the sides take turns."""
    folder = Path(job.folder)
    job_path = folder / "job.json"
    job.write(job_path)
    answers: dict[str, dict] = {}
    for number in range(rounds):
        for name in sides:
            print(f"{job.model}: {name}, round {number + 1} of {rounds}", file=sys.stderr)
            side, result = SIDES[name], folder / f"{name.replace(' ', '-')}-{number}.json"
            path = None if name == "warpo" else peers
            child(
                ["-m", side.module, str(job_path), str(result), *side.arguments],
                path,
                result.with_suffix(".log"),
                side.tuned,
            )
            answer = json.loads(result.read_text())
            if name in answers:
                answers[name]["steps"] += answer["steps"]
                answers[name]["peaks"].append(answer["peak_bytes"])
            else:
                imported = child(["-c", _IMPORT, *side.imports], path, folder / "imports.log")
                answers[name] = answer | {
                    "peaks": [answer["peak_bytes"]],
                    "imports_bytes": int(imported.split()[-1]),
                }
    return answers


def row_of(job: Job, name: str, answer: dict, weight_bytes: int) -> dict[str, Any]:
    """A row of the results: medians over the steps, in seconds."""
    steps = answer["steps"]
    times = sorted(step["step"] for step in steps)
    seconds = statistics.median(times)
    peak = statistics.median(answer["peaks"])
    return {
        "trainer": name,
        "model": job.model,
        "weight_bytes": weight_bytes,
        "completions": job.completions,
        "group_size": job.group_size,
        "prompt_tokens": job.prompt_tokens,
        "new_tokens": job.new_tokens,
        "completion_tokens": answer["completion_tokens"],
        "steps": len(steps),
        "step_s": seconds,
        "step_p20_s": times[len(times) // 5],
        "step_p80_s": times[len(times) * 4 // 5],
        "step_cpu_s": statistics.median(step["cpu"] for step in steps),
        "tokens_per_s": job.completions * job.max_model_len / seconds,
        "phases_s": {
            phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in PHASES
        },
        "resident_above_imports_bytes": answer["resident_bytes"] - answer["imports_bytes"],
        "peak_bytes": peak,
        "peak_above_imports_bytes": peak - answer["imports_bytes"],
        "reward": answer["reward"],
        "versions": answer["versions"],
    }


def goals_of(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """What warpo is held to, against each run of TRL, and what it reached.

    Time by the clock and of the processor: the latter leaves out what neighbours take.
    """
    by_name = {row["trainer"]: row for row in rows}
    mine = by_name.pop("warpo", None)
    return (
        [] if mine is None else [goal for other in by_name.values() for goal in _goals(mine, other)]
    )


def _goals(mine: dict, other: dict) -> list[dict[str, Any]]:
    common = {"model": mine["model"], "against": other["trainer"]}
    goals = []
    for figure, key in (("time", "step_s"), ("CPU time", "step_cpu_s")):
        share = mine[key] / other[key]
        goals.append(common | {"figure": f"share of the step's {figure}", "goal": f"<= {TIME_GOAL}",
                               "reached": share, "met": share <= TIME_GOAL})  # fmt: skip
    peak = "peak_above_imports_bytes"
    copies = (other[peak] - mine[peak]) / mine["weight_bytes"]
    goals.append(common | {"figure": "copies of the weights less at the peak",
                           "goal": f">= {WEIGHTS_GOAL}", "reached": copies,
                           "met": copies >= WEIGHTS_GOAL})  # fmt: skip
    return goals


def table_of(rows: Sequence[dict]) -> str:
    """A column for each trainer of one model, times in milliseconds."""
    ms, mib = 1e3, 2**-20
    lines = [[f"{rows[0]['model']}, median", *(row["trainer"] for row in rows)]]
    for phase in PHASES:
        lines.append([f"{phase} ms", *(f"{ms * row['phases_s'][phase]:.1f}" for row in rows)])
    lines.append(["step ms", *(f"{ms * row['step_s']:.0f}" for row in rows)])
    lines.append(["  p20 to p80", *(f"{ms * row['step_p20_s']:.0f} to {ms * row['step_p80_s']:.0f}"
                                    for row in rows)])  # fmt: skip
    lines.append(["  CPU ms", *(f"{ms * row['step_cpu_s']:.0f}" for row in rows)])
    lines.append(["tokens/s", *(f"{row['tokens_per_s']:.0f}" for row in rows)])
    held = (f"{mib * row['resident_above_imports_bytes']:.0f}" for row in rows)
    lines.append(["MiB above imports before the first update", *held])
    lines.append(["peak MiB", *(f"{mib * row['peak_bytes']:.0f}" for row in rows)])
    above = (f"{mib * row['peak_above_imports_bytes']:.0f}" for row in rows)
    lines.append(["  above imports", *above])
    lines.append(["weights MiB", *(f"{mib * row['weight_bytes']:.1f}" for row in rows)])
    lines.append(["timed steps", *(str(row["steps"]) for row in rows)])
    return aligned(lines, 1)


def goals_table(goals: Sequence[dict]) -> str:
    lines = [["model", "figure", "against", "goal", "reached", ""]]
    for goal in goals:
        lines.append([goal["model"], goal["figure"], goal["against"], goal["goal"],
                      f"{goal['reached']:.2f}", "met" if goal["met"] else "missed"])  # fmt: skip
    return aligned(lines, 3)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m warpo.bench.train", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "20m"])
    parser.add_argument("--trainers", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1, help="processes of each trainer")
    parser.add_argument("--steps", type=int, default=0, help="timed ones; 0: by model")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before those")
    parser.add_argument("--prompts", type=int, default=0, help="prompts of a step; 0: by model")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the tiny model, 3 steps")
    parser.add_argument("--peers", type=Path, default=Path(".peers/trl"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    args = parser.parse_args(argv)
    if args.warm_up < 1 or args.steps < 0 or args.rounds < 1:
        parser.error("--warm-up and --rounds must be at least 1, --steps at least 0")
    if args.quick:
        args.models, args.steps, args.rounds, args.warm_up = ["tiny"], 3, 1, 1
    return args


def job_of(args: argparse.Namespace, model: str, folder: str) -> Job:
    return Job(
        folder=folder,
        model=model,
        steps=args.steps or STEPS[model],
        warm_up=args.warm_up,
        prompts_per_step=args.prompts or PROMPTS[model],
        group_size=args.group_size,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        lr=args.lr,
        kv_cache_gib=0.25,
        seed=args.seed,
    )


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    common = environment("warpo.bench.train", processor())
    goals = []
    with (args.out / "train.jsonl").open("w", encoding="utf-8") as file:
        for model in args.models:
            with tempfile.TemporaryDirectory() as folder:
                job = job_of(args, model, folder)
                weight_bytes = make(job)
                answers = measure(job, args.trainers, args.rounds, args.peers.absolute())
            rows = [row_of(job, name, answer, weight_bytes) for name, answer in answers.items()]
            file.writelines(json.dumps(row | common) + "\n" for row in rows)
            file.flush()
            print(f"{table_of(rows)}\n", flush=True)
            goals += goals_of(rows)
    if goals:
        print(goals_table(goals))


if __name__ == "__main__":
    main()
