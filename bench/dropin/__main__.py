"""Time every function of TRL, verl, OpenRLHF, torchrl and Stable-Baselines3 that warpo replaces,
beside the library's own, on the same tensors; and the loops of single-file PPO.

    make bench-dropin, or, where `make peers` has been run: warpo bench dropin --out DIR

Prints a table, one row a function, size and mode, and a summary, one row a function. Writes
OUT/dropin.jsonl with machine, versions, date and command. Exit status 1 where one of ours is slower
than what it replaces.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warpo.bench.environment import aligned, environment, processor
from warpo.bench.peers import STAND_INS
from warpo.kernels.integrations.doctor import LIBRARIES

CHOICES = (*LIBRARIES, "arrays")
# The two sides take turns, but single runs of this virtual machine differ by a few percent.
AT_LEAST = 0.97


def measured(library: str, peers: Path, only: str) -> list[dict[str, Any]]:
    """The rows of one library.

    Raises:
        RuntimeError: its process failed.
    """
    overlay = peers / library / "site-packages"
    path = [STAND_INS, overlay.absolute(), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        done = subprocess.run(
            [sys.executable, "-m", "warpo.bench.dropin.side", library, rows, "--only", only],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{library} ended with status {done.returncode}: see above")
        return [json.loads(line) for line in rows.read_text().splitlines()]


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [
        [
            "library",
            "function",
            "size",
            "mode",
            "library ms",
            "warpo ms",
            "x",
            "peak MB",
            "warpo MB",
        ]
    ]
    for row in rows:
        line = [row["library"], row["function"], row["size"], row["mode"]]
        if "problem" in row:
            lines.append([*line, row["problem"][:60], "", "", "", ""])
            continue
        lines.append(
            [
                *line,
                f"{row['library_ms']:.4g}",
                f"{row['warpo_ms']:.4g}",
                f"{row['times_as_fast']:.2f}",
                f"{row['library_peak_bytes'] / 1e6:.1f}",
                f"{row['warpo_peak_bytes'] / 1e6:.1f}",
            ]
        )
    return aligned(lines, 4)


def summary_of(rows: Sequence[dict[str, Any]]) -> str:
    """One line per function: the speed-up, over its sizes and dtypes."""
    modes = ("forward", "forward + backward")
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if "problem" not in row:
            ratios = found.setdefault((row["library"], row["function"]), {m: [] for m in modes})
            ratios[row["mode"]].append(row["times_as_fast"])
    lines = [
        ["| library", "| function", "| x forward", "| x forward + backward |"],
        ["|---", "|---", "|---", "|---|"],
    ]
    for (library, function), ratios in found.items():
        cells = [_range(ratios[mode]) for mode in modes]
        lines.append([f"| {library}", f"| `{function}`", f"| {cells[0]}", f"| {cells[1]} |"])
    return aligned(lines, 4)


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return low if low == high else f"{low} to {high}"


def main(argv: Sequence[str] | None = None) -> int:
    """`warpo bench dropin ARGV`; see its --help for the exit status."""
    parser = argparse.ArgumentParser(
        prog="warpo bench dropin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=", ".join(CHOICES))
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="functions with TEXT in the name"
    )
    parser.add_argument("--peers", type=Path, default=Path(".peers"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    for library in args.libraries:
        if library not in CHOICES:
            parser.error(f"there is no integration {library!r}, only {', '.join(CHOICES)}")
    common = environment(["warpo", "bench", "dropin", *words], processor())
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with (args.out / "dropin.jsonl").open("w", encoding="utf-8") as file:
        for library in args.libraries or CHOICES:
            found = measured(library, args.peers, args.only)
            file.writelines(json.dumps(row | common) + "\n" for row in found)
            file.flush()
            rows += found
    print(f"{table_of(rows)}\n\nTimes as fast as the library, least to most over the sizes:\n")
    print(summary_of(rows))
    slow = [row for row in rows if row.get("times_as_fast", 0.0) < AT_LEAST]
    if slow:
        print(f"\nslower than what they replace, or failed:\n{table_of(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
