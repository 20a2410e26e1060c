"""`warpo bench`: every operation against the limits of this machine and against what one would run
instead.
"""

import argparse
import contextlib
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from warpo.bench import peers, shapes
from warpo.bench.environment import environment, gpu_state, processor
from warpo.bench.limits import limits
from warpo.bench.operation import MODES, Provider
from warpo.bench.operations import OPERATIONS
from warpo.bench.progress import Progress, shown
from warpo.bench.suite import Plan, Point, providers_of, rows_of

COMMANDS = {
    "compare": "warpo.bench.compare",
    "train": "warpo.bench.train.__main__",
    "dropin": "warpo.bench.dropin.__main__",
    "control": "warpo.bench.control.__main__",
    "gpu": "warpo.bench.gpu.__main__",
}
BUDGET_S = {"quick": 0.06, "laptop": 0.5, "h200": 0.3}

DESCRIPTION = """\
Times operations of warpo.kernels.ops against PyTorch, torch.compile and the libraries that `make
peers` installs, on the same tensors in turns, and compares them with what this machine can do at
most, measured in the same run. A provider that is wrong against float64 gets no time.

    warpo bench                                    # all operations, preset quick
    warpo bench logprobs gae --shapes laptop       # two of them, curves over the size
    warpo bench logprobs --shapes mine.yaml --dtype bfloat16 --mode fwd+bwd
    warpo bench --list                             # operations, their sizes and providers
    warpo bench compare A B                        # what got faster or slower, beyond the noise
    warpo bench train                              # a GRPO step against TRL's; weight sync; scaling
    warpo bench dropin                             # what trl.patch() and others replace, against it
    warpo bench control                            # SAC and PPO against Stable-Baselines3
    warpo bench gpu                                # on a GPU: goals, counters, tests, training

OUT gets bench.jsonl, plots as PNG, and index.html, one page with all of it. Ctrl-C ends the run and
keeps what was measured.
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="warpo bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operations", nargs="*", metavar="OP", help="all, if none is named")
    parser.add_argument("--list", action="store_true", help="what there is to time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shapes",
        default="quick",
        metavar="PRESET|FILE",
        help=f"{', '.join(shapes.PRESETS)}, or a YAML file (default quick)",
    )
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="default: by operation")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default fwd and fwd+bwd")
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="these alone: cpu, triton, cuda, eager, compile, trl, ...",
    )
    parser.add_argument("--quick", action="store_true", help="short timings")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile too, which takes seconds a case; with short timings only for the last "
        "dtype and mode of each operation",
    )
    parser.add_argument("--cold", action="store_true", help="flush the caches before each run")
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(".peers"),
        metavar="DIR",
        help="where `make peers` has put other libraries (default .peers)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/latest"),
        metavar="DIR",
        help="for rows, plots and page (default bench/results/latest)",
    )
    args = parser.parse_args(words)
    unknown = [name for name in args.operations if name not in OPERATIONS]
    if unknown:
        parser.error(f"no operation {', '.join(unknown)}; there are {', '.join(OPERATIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --device cpu")
    if args.shapes not in shapes.PRESETS and not Path(args.shapes).is_file():
        parser.error(f"--shapes {args.shapes}: neither {', '.join(shapes.PRESETS)} nor a file")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: a file; pass a folder, which is made if there is none")
    return args


def points_of(args: argparse.Namespace) -> list[Point]:
    """List the points to time.

    Raises:
        ValueError: nothing, by a provider that there is not, or the file of shapes is wrong.
    """
    if args.shapes in shapes.PRESETS:
        chosen = shapes.PRESETS[args.shapes]
    else:
        chosen = shapes.read(Path(args.shapes), OPERATIONS)
    dtypes = [getattr(torch, name) for name in args.dtype or ()]
    points = [
        Point(operation=operation, sizes=sizes, dtype=dtype, mode=mode)
        for operation in (OPERATIONS[name] for name in args.operations or OPERATIONS)
        for sizes in shapes.of(operation, chosen)
        for dtype in (dtypes or operation.dtypes)
        if dtype in operation.dtypes or (dtype is torch.float16 and len(operation.dtypes) > 1)
        for mode in operation.modes
        if mode in (args.mode or ("fwd", "fwd+bwd"))
    ]
    if not points:
        raise ValueError(
            f"--shapes {args.shapes}, --dtype and --mode leave nothing to time of "
            f"{', '.join(args.operations or OPERATIONS)}: see warpo bench --list"
        )
    timed = [name for point in points for name in providers_of(point.operation, args.device)]
    unknown = [name for name in args.providers or () if name not in timed]
    if unknown:
        raise ValueError(
            f"--providers {', '.join(unknown)}: of these operations on {args.device} there are "
            f"{_names(timed)}"
        )
    return points


def _names(providers: Iterable[str]) -> str:
    """Each once; in quotes where a shell needs them."""
    return ", ".join(shlex.quote(name) for name in dict.fromkeys(providers))


def run(args: argparse.Namespace, points: Sequence[Point], words: Sequence[str]) -> int:
    """Times, writes and shows; what was measured before an interrupt is kept."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    status = 0
    with (args.out / "bench.jsonl").open("w", encoding="utf-8") as file:
        try:
            for row in measured(args, points, words):
                rows.append(row)
                write(file, row)
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept", file=sys.stderr)
            status = 130
    if rows:
        show(rows, args.out)
    return status


def measured(
    args: argparse.Namespace, points: Sequence[Point], words: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of all points, with the progress on the terminal."""
    quick = args.quick or args.shapes == "quick"

    def wanted(point: Point, name: str) -> bool:
        if args.providers and name in args.providers:
            return True
        if name == "compile":
            whole = point.dtype, point.mode
            last = point.operation.dtypes[-1], point.operation.modes[-1]
            return args.compile and (not quick or whole == last)
        return not args.providers

    libraries = libraries_of(points, wanted)
    with shown(Progress([1.0] * (1 + len(libraries) + len(points)))) as tell:
        for name, providers in libraries.items():
            tell(f"importing {name}")
            for provider in providers:
                with contextlib.suppress(Exception):  # its rows say why
                    provider.load()
        tell("limits of this machine")
        plan = Plan(
            device=args.device,
            limits=limits(args.device, 0.1, args.cold),
            budget_s=BUDGET_S.get("quick" if quick else args.shapes, 0.5),
            cold=args.cold,
            wanted=wanted,
        )
        common = described(args, plan, words)
        last = ""
        for point in points:
            tell(point.title)
            if plan.device == "cuda" and point.operation.name != last:
                last, common["gpu"] = point.operation.name, gpu_state()
            for row in rows_of(point, plan):
                yield row | common


def libraries_of(
    points: Sequence[Point], wanted: Callable[[Point, str], bool]
) -> dict[str, list[Provider]]:
    """The providers of other libraries by the library: importing them takes seconds."""
    found: dict[str, list[Provider]] = {}
    for point in {point.operation.name: point for point in points}.values():
        for name, provider in point.operation.others.items():
            library = name.partition(",")[0]
            if wanted(point, name) and library != "warpo":
                found.setdefault(library, []).append(provider)
    return found


def described(args: argparse.Namespace, plan: Plan, words: Sequence[str]) -> dict[str, Any]:
    """The facts by which a reader judges and repeats a row."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    found = environment(["warpo", "bench", *words], name)
    return found | {
        "device": args.device,
        "limits": dict(plan.limits),
        "versions": {"torch": torch.__version__} | peers.versions(),
    }


def write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def show(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Tables on the terminal; plots and the page in the folder."""
    from warpo.bench.report import table

    print(f"{table.details(rows)}\n\n{table.cases(rows)}\n\n{table.headline(rows)}")
    try:
        from warpo.bench.report import page
    except ImportError as error:
        print(f"no plots and no page: {error}; pip install matplotlib", file=sys.stderr)
        return
    print(f"\n{page.write(rows, out)}")


def listing() -> str:
    """Operations, their sizes, and who is timed."""
    lines = []
    for name, operation in OPERATIONS.items():
        who = _names(providers_of(operation, "cpu"))
        lines.append(f"{name:32} {shapes.key_of(operation):32} {', '.join(operation.modes)}; {who}")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """`warpo bench WORDS`; exit status 0, 1 of `compare` at a regression, 2 wrong usage, 130
    interrupted.
    """
    if words and words[0] in COMMANDS:
        return importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    args = parse(words)
    if args.list:
        print(listing())
        return 0
    peers.use(args.peers)
    try:
        points = points_of(args)
    except ValueError as error:
        print(f"warpo bench: {error}", file=sys.stderr)
        return 2
    return run(args, points, words)
