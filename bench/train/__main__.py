"""`warpo bench train`: a GRPO step of warpo beside one of TRL's, weight sync, and how the learner's
step grows, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from warpo.bench import resync
from warpo.bench.environment import environment, processor
from warpo.bench.progress import Progress, shown
from warpo.bench.train import rows as steps
from warpo.bench.train import scaling
from warpo.bench.train.job import MODELS, Job, make
from warpo.bench.train.processes import SIDES, Runs, child
from warpo.bench.train.rows import Row

SAMPLERS = ("vllm", "transformers")
# Timed steps of a process and prompts of a step, so that the command ends within minutes.
STEPS = {"tiny": 3, "20m": 2, "32k": 2, "100m": 2}
PROMPTS = {"tiny": 8, "20m": 4, "32k": 4, "100m": 2}
# What to expect until a part has been timed: start of a process, with its imports measured, a step,
# weight sync, and a curve.
START_S = {"vllm": 25.0, "transformers": 12.0}
STEP_S = {"tiny": 4.0, "20m": 9.0, "32k": 9.0, "100m": 25.0}
SYNC_S, CURVE_S = 45.0, 25.0

DESCRIPTION = """\
Three measurements on this machine's CPU, each in processes of its own that take turns:

  steps     the same GRPO job (model, data, batch, lengths, reward, sampler) on warpo and on TRL's
            GRPOTrainer: seconds by phase, tokens per second, peak memory; with vLLM in the
            trainer's process, and without, where both sample with transformers (the first of
            --prompt-tokens only).
            "trl" is as installed, with its correction for vLLM's logprobs. "trl tuned" does
            without that, so without the phase "score", and has the settings of threads and malloc
            that `warpo train` makes for itself. warpo's goals compare with both
  sync      the learner's weights become vLLM's: by alias, packed copy, load_weights of all
            tensors and of one after the other, beside a plain copy of as many bytes
  scaling   the learner's step on given rollouts against tokens, vocabulary and group size, with
            the exponents of its time and memory: 1 is proportional

    warpo bench train                              # all of it: models tiny and 20m, prompts of
                                                   # 128 and 512 tokens
    warpo bench train --quick                      # the tiny model, 2 steps, short curves
    warpo bench train --models 100m --sampler vllm --no-sync --no-scaling
    warpo bench train --no-steps                   # sync and scaling alone; needs no TRL

OUT gets train.jsonl, resync.jsonl and scaling.jsonl, each row with machine, versions, date and
command, and a picture of each: train.png, resync.png, scaling.png. Ctrl-C ends the run and keeps
what was measured. Exit status: 0; 1 if a part failed, its row then says why; 2 wrong usage; 130
interrupted. TRL is installed by `make peers`.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="warpo bench train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="the tiny model, 2 steps, short curves")
    add("--models", nargs="+", choices=MODELS, default=["tiny", "20m"], help="default tiny 20m")
    add("--sampler", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="default both")
    add("--trainers", nargs="+", choices=SIDES, default=list(SIDES), help="default all")
    add("--steps", type=int, default=0, help="timed steps of a process; 0 (default): by model")
    add("--warm-up", type=int, default=1, help="steps before those (default 1)")
    add("--rounds", type=int, default=1, help="processes of each trainer (default 1)")
    add("--prompts", type=int, default=0, help="prompts of a step; 0 (default): by model")
    add("--group-size", type=int, default=8, help="completions of each prompt (default 8)")
    add(
        "--prompt-tokens",
        nargs="+",
        type=int,
        default=[128, 512],
        metavar="N",
        help="lengths of prompts, a job of each (default 128 512)",
    )
    add("--new-tokens", type=int, default=64, help="length of every completion (default 64)")
    add("--lr", type=float, default=1e-5, help="default 1e-5")
    add("--seed", type=int, default=0, help="of weights, prompts and draws (default 0)")
    for part in ("steps", "sync", "scaling"):
        add(f"--no-{part}", action="store_true", help=f"leave out {part}")
    add(
        "--peers",
        type=Path,
        default=Path(".peers/trl/site-packages"),
        metavar="DIR",
        help="where TRL is installed (default .peers/trl/site-packages)",
    )
    add("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    args = parser.parse_args(argv)
    least = {
        "warm_up": 1,
        "rounds": 1,
        "steps": 0,
        "prompts": 0,
        "group_size": 2,
        "new_tokens": 1,
    }
    for name, bound in least.items():
        if getattr(args, name) < bound:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is {getattr(args, name)}, and must be at least {bound}")
    if min(args.prompt_tokens) < 1:
        parser.error(f"--prompt-tokens has {min(args.prompt_tokens)}, and must be at least 1")
    if not args.lr > 0:
        parser.error(f"--lr is {args.lr}, and must be above 0")
    if args.no_steps and args.no_sync and args.no_scaling:
        parser.error("--no-steps --no-sync --no-scaling leave nothing to measure")
    if args.quick:
        args.models, args.steps, args.rounds, args.warm_up = ["tiny"], 2, 1, 1
        args.prompt_tokens = args.prompt_tokens[:1]
    return args


class Shape(NamedTuple):
    model: str
    sampler: str
    prompt_tokens: int


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """The jobs in their order; none if the steps are left out."""
    return [
        Shape(model, sampler, length)
        for model in ([] if args.no_steps else args.models)
        for sampler in args.sampler
        for length in args.prompt_tokens[: 1 if sampler == "transformers" else None]
    ]


def job_of(args: argparse.Namespace, shape: Shape, folder: str) -> Job:
    model, sampler, prompt_tokens = shape
    return Job(
        folder=folder,
        model=model,
        sampler=sampler,
        steps=args.steps or STEPS[model],
        warm_up=args.warm_up,
        prompts_per_step=args.prompts or PROMPTS[model],
        group_size=args.group_size,
        prompt_tokens=prompt_tokens,
        new_tokens=args.new_tokens,
        lr=args.lr,
        kv_cache_gib=0.25,
        seed=args.seed,
    )


class Output:
    """The rows of this run by kind ("train", "resync", "scaling"), in OUT/kind.jsonl as they come.

    Args:
        common: what every row says of machine, versions, date and command, unless it has its own.
    """

    def __init__(self, out: Path, common: Row) -> None:
        self.out, self.common = out, common
        self.rows: dict[str, list[Row]] = {}

    def keep(self, kind: str, rows: Sequence[Row]) -> None:
        mode = "a" if kind in self.rows else "w"
        whole = [self.common | row for row in rows]
        with (self.out / f"{kind}.jsonl").open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in whole)
        self.rows.setdefault(kind, []).extend(whole)


def expected_s(args: argparse.Namespace) -> list[float]:
    """Seconds of each part, in their order."""
    seconds = []
    for model, sampler, prompt_tokens in shapes_of(args):
        step = STEP_S[model] * (128 + prompt_tokens) / 256
        each = START_S[sampler] + (args.warm_up + (args.steps or STEPS[model])) * step
        seconds += [each] * args.rounds * len(args.trainers)
    seconds += [] if args.no_sync else [SYNC_S]
    curve = CURVE_S / 4 if args.quick else CURVE_S
    return seconds + ([] if args.no_scaling else [curve] * len(scaling.AXES))


def run_job(
    args: argparse.Namespace, shape: Shape, output: Output, tell: Callable[[str], Any]
) -> None:
    """One job on all trainers; what was measured is kept whatever ends it."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(args, shape, folder)
        weight_bytes = make(job)
        runs = Runs(job, args.peers.absolute())
        try:
            what = f"{shape.model}, prompts of {shape.prompt_tokens}, {shape.sampler}"
            runs.measure(args.trainers, args.rounds, lambda name: tell(f"{what}: {name}"))
        finally:
            found = [
                steps.row_of(job, name, answer, weight_bytes)
                for name, answer in runs.answers.items()
            ]
            found += [
                steps.job_row(job, name) | {"problem": problem}
                for name, problem in runs.problems.items()
            ]
            output.keep("train", found)


def run_sync(output: Output) -> None:
    """Weight sync, whose command writes its rows itself."""
    path = output.out / "resync.jsonl"
    path.unlink(missing_ok=True)
    problems: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            words = ["-m", "warpo.bench.resync", "--out", str(output.out)]
            child(words, None, Path(folder) / "log")
        except RuntimeError as error:
            problems.append({"provider": "all", "problem": str(error)})
        finally:
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                output.rows["resync"] = [json.loads(line) for line in lines]
    if problems:
        output.keep("resync", problems)


def run_curve(axis: str, quick: bool, output: Output) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        words = ["-m", "warpo.bench.train.scaling", axis, str(result)]
        try:
            child([*words, *(["--quick"] if quick else [])], None, Path(folder) / "log")
        except RuntimeError as error:
            output.keep("scaling", [{"axis": axis, "problem": str(error)}])
            return
        output.keep("scaling", json.loads(result.read_text()))


def run(args: argparse.Namespace, output: Output) -> None:
    with shown(Progress(expected_s(args))) as tell:
        for shape in shapes_of(args):
            run_job(args, shape, output, tell)
        if not args.no_sync:
            tell("weight sync")
            run_sync(output)
        for axis in [] if args.no_scaling else scaling.AXES:
            tell(f"the learner's step against {axis.replace('_', ' ')}")
            run_curve(axis, args.quick, output)


def report(rows: dict[str, list[Row]], out: Path) -> None:
    """Tables on the terminal, pictures in the folder."""
    jobs = steps.groups(rows.get("train", []))
    for job in jobs:
        print(f"{steps.table_of(job)}\n")
    goals = [goal for job in jobs for goal in steps.goals_of(job)]
    if goals:
        print(f"{steps.goals_table(goals)}\n")
    sync = [row for row in rows.get("resync", []) if "ms" in row]
    for dtype in dict.fromkeys(row["sampler_dtype"] for row in sync):
        mine = [row for row in sync if row["sampler_dtype"] == dtype]
        print("\n".join([resync.table_of(mine), *resync.goals_of(mine), ""]))
    curves = [row for row in rows.get("scaling", []) if "ms" in row]
    if curves:
        print(f"{scaling.table_of(curves)}\n")
    for row in [*rows.get("resync", []), *rows.get("scaling", [])]:
        if "problem" in row:
            print(f"{row.get('axis', 'weight sync')}: {row['problem']}\n")
    try:
        from warpo.bench.train import plots
    except ImportError as error:
        print(f"no pictures: {error}; pip install matplotlib", file=sys.stderr)
    else:
        plots.steps(rows.get("train", []), out / "train.png")
        plots.sync(sync, out / "resync.png")
        plots.scaling(curves, out / "scaling.png")
    print(f"rows and pictures: {', '.join(f'{out / kind}.jsonl, .png' for kind in rows)}")


def main(argv: Sequence[str] | None = None) -> int:
    """`warpo bench train ARGV`; see its --help for the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    args.out.mkdir(parents=True, exist_ok=True)
    common: Row = dict(environment(["warpo", "bench", "train", *words], processor()))
    common["versions"] = {name: version(name) for name in ("torch", "transformers")}
    output, status = Output(args.out, common), 0
    try:
        run(args, output)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        status = 130
    report(output.rows, args.out)
    failed = any("problem" in row for rows in output.rows.values() for row in rows)
    return status or int(failed)


if __name__ == "__main__":
    sys.exit(main())
