"""`make gpu` and `make gpu-sanitize`: what can be learnt of the kernels in minutes on a GPU."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from warpo.bench.gpu import steps
from warpo.bench.gpu.build import ROOT, SITE
from warpo.bench.gpu.results import BENCH, LOG, ROWS
from warpo.bench.gpu.runner import Runner

DESCRIPTION = """\
Measures warpo on a machine with a CUDA GPU, torch, triton and nvcc, where time is scarce.

    python -m warpo.bench.gpu              # at most 8 minutes on 16 cores: versions, build for this
                                           # GPU alone, smoke test of every operation, times beside
                                           # PyTorch and goals, hardware counters, tests on CUDA,
                                           # SFT and GRPO end to end
    python -m warpo.bench.gpu sanitize     # at most 200 seconds: memcheck, racecheck and synccheck
                                           # beside the tests of the Triton kernels, then the goals
                                           # with longer timings; results in OUT/sanitize
    python -m warpo.bench.gpu show         # the tables again, of what is in OUT

Each step has a limit, and one that fails or hangs stops no other. A line says how each ended.
Everything is appended to OUT as it is measured, so that a stop at any second leaves what was
measured until then: rows.jsonl (steps, versions, smoke, counters, failed tests, metrics of the
training), bench.jsonl (times), log.txt and the logs of steps that run side by side, and the built
module, for `sanitize` on another machine: copy it to kernels/.

A machine without a network needs a few wheels: `make gpu-wheels` fetches them to .wheels, which is
to be carried there. Exit status: 0; 1 if a step failed; 2 wrong usage.
"""


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m warpo.bench.gpu",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=["gpu", "sanitize", "show"], default="gpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds (default 480 and 200)")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda",
        help="cpu: at tiny sizes, to see that every step works before a GPU is there",
    )
    args = parser.parse_args(words)
    out = args.out.absolute()
    if args.part == "sanitize":
        out /= "sanitize"
    if args.part == "show":
        _show(out)
        return 0
    if args.device == "cuda" and not sees_cuda():
        parser.error("torch sees no CUDA device; on this machine use make test")
    return run(args.part, out, args.device, args.budget or steps.BUDGET_S[args.part])


def sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run(part: str, out: Path, device: str, budget_s: float) -> int:
    """Run the steps of a part, from a folder without earlier results; the exit status."""
    os.chdir(ROOT)
    os.environ.update(steps.environment(ROOT, SITE))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    plan: Callable[[Path, str], steps.Stages] = steps.gpu if part == "gpu" else steps.sanitize
    stages = plan(out, device)
    out.mkdir(parents=True, exist_ok=True)
    for name in {LOG, ROWS, BENCH, *(step.log for stage in stages for step in stage)}:
        (out / name).unlink(missing_ok=True)
    try:
        good = Runner(out, budget_s, tell=_tell).run(stages)
    finally:
        print(flush=True)
        _show(out)
        print(f"\n{out}", flush=True)
    return 0 if good else 1


def _show(out: Path) -> None:
    from warpo.bench.gpu import report  # imports torch, which a run does not wait for

    print(report.text(out), flush=True)


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
