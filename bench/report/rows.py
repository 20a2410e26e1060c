"""Selections and summaries of the rows, for table, plots and page."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
WARPO = ("cpu", "triton", "cuda")
BASES = ("eager", "compile")


def size(row: Row) -> str:
    """Its sizes, as the tables show them."""
    return " x ".join(str(n) for n in row["sizes"].values())


def elements(row: Row) -> int:
    """The product of its sizes: where a row stands on the axis of a plot."""
    return math.prod(row["sizes"].values())


def key(row: Row) -> tuple[str, str, str, str]:
    """Key that rows compared with each other share."""
    return row["operation"], size(row), row["dtype"], row["mode"]


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "ms" in row]


def shown(rows: Sequence[Row]) -> list[Row]:
    """Without those of libraries that are not installed, which `problems` names once."""
    return [row for row in rows if not row.get("problem", "").startswith("Missing")]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Rows with times by what they share, then by provider."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in timed(rows):
        found.setdefault(key(row), {})[row["provider"]] = row
    return found


def is_ours(provider: str) -> bool:
    """True for a backend of warpo, or warpo used in another way."""
    return provider in WARPO or provider.startswith("warpo")


def ours(providers: dict[str, Row]) -> Row | None:
    """The fastest backend of warpo."""
    mine = [providers[name] for name in WARPO if name in providers]
    return min(mine, key=lambda row: row["ms"]) if mine else None


def best_other(providers: dict[str, Row]) -> Row | None:
    """The fastest of the other libraries: neither PyTorch, torch.compile nor warpo."""
    others = [row for name, row in providers.items() if name not in BASES and not is_ours(name)]
    return min(others, key=lambda row: row["ms"]) if others else None


def summary(rows: Sequence[Row]) -> list[Row]:
    """One entry for each operation, size, dtype and mode: warpo's time, its speed-up over
    each of the others, and its share of the limit.
    """
    found = []
    for (operation, sizes, dtype, mode), providers in groups(rows).items():
        mine = ours(providers)
        if mine is None:
            continue
        other = best_other(providers)
        ratios: dict[str, float] = {
            name: providers[name]["ms"] / mine["ms"]
            for name in ("eager", "compile")
            if name in providers
        }
        if other is not None:
            ratios["other"] = other["ms"] / mine["ms"]
        found.append(
            {
                "operation": operation,
                "size": sizes,
                "dtype": dtype,
                "mode": mode,
                "ms": mine["ms"],
                "share": mine["share_of_limit"],
                "limit": mine["limit"],
                "backend": mine["provider"],
                "ratios": ratios,
                "other": other["provider"] if other is not None else "",
            }
        )
    return found


def share_of_limit(share: float, limit: str) -> str:
    """As "51% matrix"."""
    return f"{share:.0%} {limit.partition('_')[0]}"


def against(entry: Row, name: str) -> str:
    """Times as fast as "eager", "compile" or "other", of an entry of `summary`."""
    if name not in entry["ratios"]:
        return ""
    library = f" ({entry['other']})" if name == "other" else ""
    return f"{entry['ratios'][name]:.1f}{library}"


def figures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The figures that sum up a run, each with what it says."""
    entries = summary(rows)
    found = []
    for name, text in (
        ("eager", "as fast as plain PyTorch"),
        ("compile", "as fast as torch.compile"),
        ("other", "as fast as the best other library"),
    ):
        ratios = [entry["ratios"][name] for entry in entries if name in entry["ratios"]]
        if ratios:
            found.append(
                (
                    f"{statistics.geometric_mean(ratios):.1f}x",
                    f"{text}: geometric mean of {len(ratios)} cases, "
                    f"{min(ratios):.1f}x to {max(ratios):.0f}x",
                )
            )
    if entries:
        share = statistics.median(entry["share"] for entry in entries)
        found.append((f"{share:.0%}", "of what this machine can do at most: median of all cases"))
    return found


def problems(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Why providers have no time: reason -> where."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "problem" in row:
            where = found.setdefault(f"{row['provider']}: {row['problem']}", [])
            if row["operation"] not in where:
                where.append(row["operation"])
    return found
