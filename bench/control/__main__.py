"""Control beside Stable-Baselines3 and sb3-contrib, which has its TRPO: same settings, same number
of environment steps, several seeds.

    make bench-control, or, where `make peers` has been run: warpo bench control --out DIR

The settings are those of examples/sac.yaml (Pendulum-v1), examples/ppo_gymnasium.yaml and
examples/trpo_gymnasium.yaml (CartPole-v1). Neither has SAC of discrete actions, nor SAC with a
value function. Each run is a process of its own with one thread; the trainers take turns. Both are
evaluated without exploration in the same episodes. Prints the returns, the time and the goals.
Writes OUT/control.jsonl, one row for each trainer, algorithm and seed, with versions, date, machine
and command, and OUT/control.png, the learning curves of both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from warpo.bench.control.side import SIDES
from warpo.bench.environment import aligned, environment, processor
from warpo.bench.progress import Progress, shown
from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import read_tree

EXAMPLES = {name: f"examples/{name}.yaml" for name in ("sac", "ppo_gymnasium", "trpo_gymnasium")}
# Environment steps, and those between two evaluations.
STEPS = {
    "sac": (8_000, 1_000),
    "ppo_gymnasium": (51_200, 5_120),
    "trpo_gymnasium": (51_200, 5_120),
}
COLORS = {"warpo": "#2563a8", "stable-baselines3": "#d9730d"}


def measure(args: argparse.Namespace, algorithm: str, name: str, seed: int) -> dict[str, Any]:
    """A row of the results: one run in a process.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    steps, every = STEPS[algorithm]
    steps = args.steps or steps
    path = [str(args.peers.absolute())] if name != "warpo" else []
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        overrides = {
            "output_dir": f"{folder}/run",
            "steps": steps,
            "seed": seed,
            "evaluation.every_steps": min(every, steps),
            "evaluation.episodes": args.episodes,
        }
        flags = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
        words = [name, EXAMPLES[algorithm], str(result), *flags]
        done = subprocess.run(
            [sys.executable, "-m", "warpo.bench.control.side", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            end = "".join(done.stdout.splitlines(keepends=True)[-12:])
            raise RuntimeError(
                f"{name}, {algorithm}, seed {seed} ended with status {done.returncode}; "
                f"Stable-Baselines3 is installed by `make peers`; the end of its output:\n{end}"
            )
        answer = json.loads(result.read_text())
    config = read_tree(ControlConfig, Path(EXAMPLES[algorithm]), flags)
    return {
        "trainer": name,
        "algorithm": algorithm,
        "environment": config.environment,
        "seed": seed,
        "steps": answer["curve"][-1][0],
        "return": answer["curve"][-1][1],
        "curve_mean": statistics.fmean(value for _, value in answer["curve"]),
        **answer,
    }


def summaries(rows: Sequence[dict]) -> dict[tuple[str, str], dict[str, Any]]:
    """Mean and standard deviation over the seeds, by algorithm and trainer."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["algorithm"], row["trainer"]].append(row)
    found = {}
    for key, group in groups.items():
        summary: dict[str, Any] = {"environment": group[0]["environment"], "seeds": len(group)}
        for name in ("return", "curve_mean", "run_s", "cpu_s"):
            values = [row[name] for row in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary |= {name: statistics.fmean(values), f"{name}_std": spread}
        found[key] = summary
    return found


def goals_of(found: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """In the same number of steps, the mean return of Stable-Baselines3, less the larger of the
    two standard deviations over the seeds.
    """
    goals = []
    for algorithm in EXAMPLES:
        mine, theirs = (found.get((algorithm, name)) for name in SIDES)
        if mine and theirs:
            goal = theirs["return"] - max(mine["return_std"], theirs["return_std"])
            goals.append(
                {
                    "algorithm": algorithm,
                    "goal": goal,
                    "reached": mine["return"],
                    "met": mine["return"] >= goal,
                }
            )
    return goals


def table_of(found: dict[tuple[str, str], dict[str, Any]], goals: Sequence[dict]) -> str:
    lines = [
        ["algorithm", "environment", "trainer", "seeds", "return", "mean of curve", "s", "CPU s"]
    ]
    for (algorithm, trainer), row in found.items():
        name = [algorithm, row["environment"], trainer, str(row["seeds"])]
        figures = ("return", "curve_mean", "run_s", "cpu_s")
        lines.append([*name, *(f"{row[x]:.1f} +- {row[f'{x}_std']:.1f}" for x in figures)])
    verdicts = [
        f"{goal['algorithm']}: return >= {goal['goal']:.1f}: {goal['reached']:.1f}, "
        + ("met" if goal["met"] else "missed")
        for goal in goals
    ]
    return "\n".join([aligned(lines, 3), *verdicts])


def plot(rows: Sequence[dict], path: Path) -> None:
    """Each seed faintly, and the mean of the trainer."""
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    figure = Figure(figsize=(7 * len(algorithms), 4.5), dpi=100, layout="constrained")
    for axes, algorithm in zip(
        figure.subplots(1, len(algorithms), squeeze=False).flat, algorithms, strict=True
    ):
        mine = [row for row in rows if row["algorithm"] == algorithm]
        for name, color in COLORS.items():
            curves = [row["curve"] for row in mine if row["trainer"] == name]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=color, alpha=0.25, linewidth=1)
            points = [
                (stage[0][0], statistics.fmean(value for _, value in stage))
                for stage in zip(*curves, strict=False)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linewidth=2, label=name)
        axes.set_title(f"{mine[0]['environment']}, {algorithm}", loc="left")
        axes.set_xlabel("environment steps")
        axes.set_ylabel("return without exploration")
        axes.grid(color="#e3e3e3", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def versions(peers: Path) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("gymnasium", "numpy")}
    for distribution in importlib.metadata.distributions(path=[str(peers)]):
        name = distribution.metadata["Name"].replace("_", "-")
        if name in ("stable-baselines3", "sb3-contrib"):
            found[name] = distribution.version
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="warpo bench control", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--algorithms", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--trainers", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--steps", type=int, default=0, help="of a run; 0: by algorithm")
    parser.add_argument("--episodes", type=int, default=10, help="of an evaluation")
    parser.add_argument(
        "--peers", type=Path, default=Path(".peers/stable_baselines3/site-packages"), metavar="DIR"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """`warpo bench control ARGV`."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    args.out.mkdir(parents=True, exist_ok=True)
    common = environment(["warpo", "bench", "control", *words], processor())
    common |= versions(args.peers)
    common["threads"] = 1
    runs = list(itertools.product(args.algorithms, range(args.seeds), args.trainers))
    rows = []
    with (
        (args.out / "control.jsonl").open("w", encoding="utf-8") as file,
        shown(Progress([1.0] * len(runs))) as tell,
    ):
        for algorithm, seed, name in runs:
            tell(f"{algorithm}: {name}, seed {seed}")
            rows.append(measure(args, algorithm, name, seed))
            file.write(json.dumps(rows[-1] | common) + "\n")
            file.flush()
    plot(rows, args.out / "control.png")
    found = summaries(rows)
    print(table_of(found, goals_of(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
