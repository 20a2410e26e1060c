"""`warpo bench compare A B`: what got faster or slower between two runs, beyond the noise."""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warpo.bench.environment import aligned
from warpo.bench.report.rows import Row, is_ours, key

DESCRIPTION = """\
Compares two runs of `warpo bench` on the same machine. The other providers, whose code is the same
in both, tell what the machine did: a case of warpo is compared with theirs, and what 9 of 10 of
them changed by is noise. A time has changed if it did so by more than that and the threshold, and
the spreads, p20 to p80, do not overlap. Where no others were timed, or their versions differ, all
times are compared as they are.

    warpo bench gae --out before; git switch faster; warpo bench gae --out after
    warpo bench compare before after

Exit status 1 if a kernel of warpo got slower or has no time any more; 0 else; 2 if there is nothing
to compare.
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


@dataclass(frozen=True)
class Change:
    """A case that differs, or whose time is gone: times_as_long is inf then."""

    row: Row
    before: Row
    times_as_long: float

    @property
    def is_regression(self) -> bool:
        return is_ours(self.row["provider"]) and self.times_as_long > 1


class Comparison:
    """Cases that two runs have in common.

    Attributes:
        pairs: each before and after.
        controlled: other providers, of the same versions in both runs, say what the machine did.
        noise: what 9 of 10 of them changed by: 0.1 is 1.1 times as long or as fast.
    """

    def __init__(self, before: Sequence[Row], after: Sequence[Row]) -> None:
        old = {(*key(row), row["provider"]): row for row in before}
        found = [(old.get((*key(row), row["provider"])), row) for row in after]
        self.pairs = [(base, row) for base, row in found if base is not None]
        same = before[0].get("versions") == after[0].get("versions")
        controls: dict[tuple[str, ...], list[float]] = {}
        for base, row in self.pairs if same else []:
            if not is_ours(row["provider"]) and "ms" in base and "ms" in row:
                controls.setdefault(key(row), []).append(row["ms"] / base["ms"])
        self._drift = {case: statistics.median(ratios) for case, ratios in controls.items()}
        sizes = sorted(max(r, 1 / r) for ratios in controls.values() for r in ratios)
        self.controlled = bool(sizes)
        self.noise = sizes[len(sizes) * 9 // 10] - 1 if sizes else 0.0

    def changes(self, threshold: float) -> list[Change]:
        """Those beyond threshold and noise, the largest first."""
        limit = 1 + max(threshold, self.noise)
        found = []
        for base, row in self.pairs:
            if "ms" not in base or (self.controlled and not is_ours(row["provider"])):
                continue
            if "ms" not in row:
                found.append(Change(row, base, math.inf))
                continue
            drift = self._drift.get(key(row), 1.0)
            ratio = row["ms"] / base["ms"] / drift
            apart = row["p20_ms"] > base["p80_ms"] * drift or row["p80_ms"] < base["p20_ms"] * drift
            if apart and not 1 / limit <= ratio <= limit:
                found.append(Change(row, base, ratio))
        return sorted(found, key=lambda c: -max(c.times_as_long, 1 / c.times_as_long))


def table_of(found: Sequence[Change], last: str) -> str:
    lines = [["operation", "size", "dtype", "mode", "provider", "before, ms", "after, ms", last]]
    for change in found:
        row, ratio = change.row, change.times_as_long
        after = f"{row['ms']:.4g}" if "ms" in row else row["problem"][:50]
        verdict = f"{ratio:.2f} times as long" if ratio > 1 else f"{1 / ratio:.2f} times as fast"
        if math.isinf(ratio):
            verdict = "no time any more"
        lines.append([*key(row), row["provider"], f"{change.before['ms']:.4g}", after, verdict])
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
    comparison = Comparison(before, after)
    if not comparison.pairs:
        parser.error(f"{args.before} and {args.after} have no case in common")
    for name in ("machine", "threads"):
        if before[0][name] != after[0][name]:
            print(f"not the same {name}: {before[0][name]}, then {after[0][name]}")
    for name, rows in (("before", before), ("after", after)):
        print(f"{name}: {rows[0]['date']}, commit {rows[0]['commit']}")
    if comparison.controlled:
        noise = f"{1 + comparison.noise:.2f}"
        print(f"noise: 9 of 10 times of other providers changed by less than {noise} times")
    else:
        print("no other providers of the same versions in both runs: changes are as they are")
    found = comparison.changes(args.threshold)
    print(f"\n{len(comparison.pairs)} cases, {len(found)} changed\n")
    if found:
        print(table_of(found, "beside the others" if comparison.controlled else ""))
    return 1 if any(change.is_regression for change in found) else 0
