"""Time steps of TRL's GRPOTrainer as it is and with warpo's kernels in it, on the CPU.

    python -m warpo.bench.dropin.grpo_trainer --out DIR, where `make peers` has been run

One job for both: a model of 32000 tokens, made on the spot, float32 or, by --bf16, autocast to
bfloat16, which is TRL's default; AdamW, DAPO's loss with a KL term, two updates a sample. Each run
is a process of its own; the two take turns. Prints seconds per step, their parts, peak memory, and
how far the losses are apart. Writes OUT/grpo_trainer.jsonl, or grpo_trainer_bf16.jsonl: a row for
each side with the losses of all steps, calls served and passed on, machine, versions, date and
command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warpo.bench.environment import aligned, environment, processor
from warpo.bench.train.job import MODELS, Job, make
from warpo.bench.train.processes import child

SIDES = {"TRL": [], "TRL with warpo": ["--patch"]}
PHASES = ("sample", "forward", "backward", "other")
MODULE = ("-W", "ignore", "-m", "warpo.bench.dropin.grpo_side")


def measure(job: Job, rounds: int, peers: Path, bf16: bool) -> dict[str, list[dict]]:
    """Run the sides in turns; the reports of each, one per round."""
    folder = Path(job.folder)
    job.write(folder / "job.json")
    answers: dict[str, list[dict]] = {name: [] for name in SIDES}
    for number in range(rounds):
        for index, (name, arguments) in enumerate(SIDES.items()):
            print(f"{name}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            result = folder / f"{index}-{number}.json"
            options = [*arguments, *(["--bf16"] if bf16 else [])]
            words = [str(folder / "job.json"), str(result), *options]
            child([*MODULE, *words], peers, result.with_suffix(".log"), tuned=False)
            answers[name].append(json.loads(result.read_text()))
    return answers


def row_of(job: Job, name: str, answers: Sequence[dict]) -> dict[str, Any]:
    """A row of the results. Steps with and without sampling alternate, so times are means over the
    steps of a round, and the median of the rounds.
    """

    def per_step(key: str) -> list[float]:
        return [statistics.fmean(step.get(key, 0.0) for step in a["steps"]) for a in answers]

    return {
        "trainer": name,
        "replaced": answers[0]["replaced"],
        "losses_by_warpo": answers[0]["losses_by_warpo"],
        "calls": answers[0]["calls"],
        "model": MODELS[job.model],
        "completions": job.completions,
        "group_size": job.group_size,
        "prompt_tokens": job.prompt_tokens,
        "new_tokens": job.new_tokens,
        "warm_up": job.warm_up,
        "steps": job.steps,
        "step_s": statistics.median(per_step("step")),
        "step_s_of_rounds": per_step("step"),
        "step_cpu_s": statistics.median(per_step("cpu")),
        "phases_s": {phase: statistics.median(per_step(phase)) for phase in PHASES},
        "peak_bytes": statistics.median(a["peak_bytes"] for a in answers),
        "losses": [row["loss"] for row in answers[0]["logs"]],
        "logs": answers[0]["logs"],
        "versions": answers[0]["versions"],
    }


def table_of(rows: Sequence[dict]) -> str:
    lines = [["a step, mean", *(row["trainer"] for row in rows), "ratio"]]

    def add(label: str, values: Sequence[float], digits: int) -> None:
        ratio = f"{values[0] / values[1]:.2f}" if values[1] else ""
        lines.append([label, *(f"{value:.{digits}f}" for value in values), ratio])

    add("seconds", [row["step_s"] for row in rows], 3)
    add("  of processor", [row["step_cpu_s"] for row in rows], 3)
    for phase in PHASES:
        add(f"  {phase}", [row["phases_s"][phase] for row in rows], 3)
    add("peak MiB", [row["peak_bytes"] / 2**20 for row in rows], 0)
    return aligned(lines, 1)


def agreement(rows: Sequence[dict]) -> str:
    """Describe how far the losses of the two sides are apart."""
    apart = [abs(a - b) for a, b in zip(*(row["losses"] for row in rows), strict=True)]
    largest = max(abs(loss) for loss in rows[0]["losses"])
    return (
        f"losses of {len(apart)} steps: at most {max(apart):.1e} apart; "
        f"the largest is {largest:.1e}; warpo computed {rows[1]['losses_by_warpo']} of them"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m warpo.bench.dropin.grpo_trainer",
        description=(__doc__ or "").split("\n\n")[0],
    )
    parser.add_argument("--model", choices=MODELS, default="32k")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side")
    parser.add_argument("--steps", type=int, default=18, help="timed ones")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those")
    parser.add_argument("--prompts", type=int, default=2, help="of a step")
    parser.add_argument("--group-size", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="autocast, TRL's default")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peers", type=Path, default=Path(".peers/trl/site-packages"), metavar="DIR"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warm_up < 1 or args.rounds < 1:
        parser.error("--steps, --warm-up and --rounds must be at least 1")
    return args


def main() -> None:
    words = sys.argv[1:]
    args = parse(words)
    args.out.mkdir(parents=True, exist_ok=True)
    common = environment(["python", "-m", "warpo.bench.dropin.grpo_trainer", *words], processor())
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            folder=folder,
            model=args.model,
            steps=args.steps,
            warm_up=args.warm_up,
            prompts_per_step=args.prompts,
            group_size=args.group_size,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            lr=args.lr,
            kv_cache_gib=0.0,
            seed=args.seed,
            sampler="transformers",
        )
        make(job)
        answers = measure(job, args.rounds, args.peers.absolute(), args.bf16)
    rows = [row_of(job, name, answers[name]) for name in SIDES]
    name = "grpo_trainer_bf16.jsonl" if args.bf16 else "grpo_trainer.jsonl"
    with (args.out / name).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row | common | {"bf16": args.bf16}) + "\n" for row in rows)
    print(f"{table_of(rows)}\n\n{agreement(rows)}")


if __name__ == "__main__":
    main()
