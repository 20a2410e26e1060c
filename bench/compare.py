"""`warpo bench compare A B`: what got faster or slower between two runs, beyond the noise."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warpo.bench.environment import aligned
from warpo.bench.report.rows import WARPO, Row, key

DESCRIPTION = """\
Compares two runs of `warpo bench` on the same machine. A time has changed if its median did by more
than the threshold and the spreads, p20 to p80, do not overlap.

    warpo bench gae --out before; git switch faster; warpo bench gae --out after
    warpo bench compare before after

Exit status 1 if a kernel of warpo got slower or has no time any more; other providers are shown
alone. 0 else; 2 if there is nothing to compare.
"""


def read(path: Path) -> list[Row]:
    """The rows of a run, from its folder or its bench.jsonl.

    Raises:
        ValueError: there are none, or a line is no row; the message names file and line.
    """
    file = path / "bench.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: pass the folder that `warpo bench --out` wrote")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            key(row), row["provider"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}:{number} is no row of warpo bench: {error!r}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no rows")
    return rows


def changes(before: Sequence[Row], after: Sequence[Row], threshold: float) -> list[dict[str, Any]]:
    """What both runs have and differs, the largest change first; times_as_long is inf where a time
    is gone.
    """
    old = {(*key(row), row["provider"]): row for row in before}
    found = []
    for row in after:
        base = old.get((*key(row), row["provider"]))
        if base is None or "ms" not in base:
            continue
        if "ms" not in row:
            found.append({"row": row, "before": base, "times_as_long": float("inf")})
            continue
        ratio = row["ms"] / base["ms"]
        apart = row["p20_ms"] > base["p80_ms"] or row["p80_ms"] < base["p20_ms"]
        if apart and not 1 / (1 + threshold) <= ratio <= 1 + threshold:
            found.append({"row": row, "before": base, "times_as_long": ratio})
    return sorted(found, key=lambda change: -max(change["times_as_long"],
                                                 1 / change["times_as_long"]))  # fmt: skip


def is_regression(change: dict[str, Any]) -> bool:
    provider = change["row"]["provider"]
    mine = provider in WARPO or provider.startswith("warpo")
    return mine and change["times_as_long"] > 1


def table_of(found: Sequence[dict[str, Any]]) -> str:
    lines = [["operation", "size", "dtype", "mode", "provider", "before, ms", "after, ms", ""]]
    for change in found:
        row, ratio = change["row"], change["times_as_long"]
        after = f"{row['ms']:.4g}" if "ms" in row else row["problem"][:50]
        verdict = f"{ratio:.2f} times as long" if ratio > 1 else f"{1 / ratio:.2f} times as fast"
        if ratio == float("inf"):
            verdict = "no time any more"
        lines.append([*key(row), row["provider"], f"{change['before']['ms']:.4g}", after, verdict])
    return aligned(lines, 5)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="warpo bench compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="share that counts as a change (default 0.05)"
    )
    args = parser.parse_args(words)
    try:
        before, after = read(args.before), read(args.after)
    except ValueError as error:
        parser.error(str(error))
    both = {(*key(r), r["provider"]) for r in before} & {(*key(r), r["provider"]) for r in after}
    if not both:
        parser.error(f"{args.before} and {args.after} have no case in common")
    for name in ("machine", "threads"):
        if before[0][name] != after[0][name]:
            print(f"not the same {name}: {before[0][name]}, then {after[0][name]}")
    for run, rows in (("before", before), ("after", after)):
        rates = ", ".join(f"{n} {v / 1e9:.3g}" for n, v in rows[0]["limits"].items())
        print(
            f"{run}: {rows[0]['date']}, commit {rows[0]['commit']}; limits in 1e9 a second: {rates}"
        )
    found = changes(before, after, args.threshold)
    print(f"\n{len(both)} cases, {len(found)} changed\n")
    if found:
        print(table_of(found))
    return 1 if any(map(is_regression, found)) else 0
