"""Times the cases of `goals` and `variants` beside PyTorch, Triton and the libraries that are
there: rows of `warpo bench`, each appended to bench.jsonl as its case ends.

    python -m warpo.bench.gpu.table --out DIR [--official]
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from warpo.bench import cli, peers
from warpo.bench.environment import gpu_state
from warpo.bench.gpu.goals import GOALS
from warpo.bench.gpu.results import BENCH, append
from warpo.bench.gpu.variants import VARIANTS
from warpo.bench.limits import limits
from warpo.bench.report.rows import Row
from warpo.bench.suite import Plan, Point, rows_of

Part = tuple[str, Callable[[Plan], Iterator[Row]]]


def parts(device: str, official: bool) -> list[Part]:
    """What is timed, in its order: what cannot be had elsewhere, then those that compile for
    seconds a case, Triton and torch.compile.
    """
    goals = [goal for goal in GOALS if goal.ms is not None or not official]
    found = [_part(goal.point(device)) for goal in goals]
    if not official:
        found += [(variant.__name__, variant) for variant in VARIANTS]
    if device == "cuda":
        found += [_part(goal.point(device), "triton") for goal in goals]
    if not official:
        found += [_part(goal.point(device), "compile") for goal in goals if goal.compiled]
    return found


def _part(point: Point, only: str = "") -> Part:
    """The providers of a case: one, or all but those that compile."""

    def wanted(point: Point, name: str) -> bool:
        return name == only if only else name not in ("triton", "compile")

    return (
        f"{point.title}{only and f', {only}'}",
        lambda plan: rows_of(point, replace(plan, wanted=wanted)),
    )


def attempt(title: str, rows: Callable[[], Iterator[Row]], write: Callable[[Row], None]) -> bool:
    """Write the rows of a part. False if it failed, which says so on the terminal."""
    try:
        for row in rows():
            write(row)
            print(title, row["provider"], row.get("ms", row.get("problem")), flush=True)
    except Exception as error:  # whatever it is, the other parts can still be measured
        print(f"{title} FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def _append(path: Path, fields: Row, row: Row) -> None:
    append(path, row | fields)


def device_is_gone(device: str) -> bool:
    """Whether an illegal access has ended all work of this process on the device."""
    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m warpo.bench.gpu.table", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--official", action="store_true", help="goals alone, longer timings")
    parser.add_argument("--first", type=int, default=0, help="number of the part to begin with")
    parser.add_argument("--failed", action="store_true", help="an earlier part has failed")
    args = parser.parse_args(words)
    peers.use(Path(".peers"))
    bench = cli.parse(["--device", args.device, "--shapes", "h200"])
    plan = Plan(
        device=args.device,
        limits=limits(args.device, 0.1),
        budget_s=cli.BUDGET_S["h200" if args.official else "quick"],
        cold=False,
        wanted=lambda point, name: True,
    )
    common = cli.described(bench, plan, ["gpu", *words])
    good = not args.failed
    for number, (title, rows) in enumerate(parts(args.device, args.official)):
        if number < args.first:
            continue
        gpu = {"gpu": gpu_state()} if args.device == "cuda" else {}
        write = partial(_append, args.out / BENCH, common | gpu)
        good &= attempt(title, partial(rows, plan), write)
        if device_is_gone(args.device):
            print("the device is gone; on with a process of its own", flush=True)
            module = [sys.executable, "-m", "warpo.bench.gpu.table", *words]
            os.execv(sys.executable, [*module, "--failed", "--first", str(number + 1)])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
