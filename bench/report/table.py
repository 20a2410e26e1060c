"""The rows as aligned text."""

from collections.abc import Sequence

from warpo.bench.environment import aligned
from warpo.bench.report.rows import (
    Row,
    against,
    figures,
    key,
    problems,
    share_of_limit,
    shown,
    size,
    summary,
)

DETAILS = [
    "operation",
    "size",
    "dtype",
    "mode",
    "provider",
    "ms",
    "p20 to p80",
    "x eager",
    "of limit",
    "peak MB",
    "host us",
]
CASES = [
    "operation",
    "size",
    "dtype",
    "mode",
    "warpo, ms",
    "x PyTorch",
    "x torch.compile",
    "x best other",
    "of limit",
]


def details(rows: Sequence[Row]) -> str:
    """One line a row; below, why providers have no time."""
    eager = {key(row): row.get("ms") for row in rows if row["provider"] == "eager"}
    lines = [DETAILS]
    for row in shown(rows):
        line = [row["operation"], size(row), row["dtype"], row["mode"], row["provider"]]
        if "problem" in row:
            lines.append([*line, "no time", *[""] * (len(DETAILS) - len(line) - 1)])
            continue
        base = eager.get(key(row))
        lines.append(
            [
                *line,
                f"{row['ms']:.4g}",
                f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
                f"{base / row['ms']:.1f}" if base else "",
                share_of_limit(row["share_of_limit"], row["limit"]),
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['host_us']:.0f}" if "host_us" in row else "",
            ]
        )
    notes = [f"{reason} ({', '.join(where)})" for reason, where in problems(shown(rows)).items()]
    absent = sorted({row["provider"] for row in rows} - {row["provider"] for row in shown(rows)})
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    return "\n".join([aligned(lines, 5), *([""] if notes else []), *notes])


def cases(rows: Sequence[Row]) -> str:
    """One line a case: warpo's time, its speed-up, its share of the limit."""
    lines = [CASES]
    for entry in summary(rows):
        lines.append(
            [
                *(entry[name] for name in ("operation", "size", "dtype", "mode")),
                f"{entry['ms']:.3g}",
                *(against(entry, name) for name in ("eager", "compile", "other")),
                share_of_limit(entry["share"], entry["limit"]),
            ]
        )
    filled = [i for i in range(len(CASES)) if any(line[i] for line in lines[1:])]
    return aligned([[line[i] for i in filled] for line in lines], 4) if filled else ""


def headline(rows: Sequence[Row]) -> str:
    """Machine, and the figures that sum up the run."""
    run = rows[0]
    cache = next((f", caches {row['cache']}" for row in rows if "cache" in row), "")
    where = f"{run['machine']}, {run['threads']} threads{cache}, torch {run['torch']}"
    return "\n".join(
        [f"{where}, {run['date'][:10]}", *(f"{value:>6} {text}" for value, text in figures(rows))]
    )
