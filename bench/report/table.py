"""The rows as aligned text."""

from collections.abc import Sequence
from typing import Any

from warpo.bench.environment import aligned

HEAD = ["operation", "size", "dtype", "mode", "provider", "ms", "p20 to p80", "x eager", "of limit",
        "peak MB", "host us"]  # fmt: skip


def text(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row; a provider without a time has its reason."""
    eager = {_key(row): row.get("ms") for row in rows if row["provider"] == "eager"}
    lines = [HEAD]
    for row in rows:
        line = [row["operation"], size(row), row["dtype"], row["mode"], row["provider"]]
        if "problem" in row:
            lines.append([*line, *[""] * (len(HEAD) - len(line))])
            lines[-1][5] = row["problem"][:50]
            continue
        base = eager.get(_key(row))
        lines.append([
            *line, f"{row['ms']:.4g}", f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
            f"{base / row['ms']:.1f}" if base else "",
            f"{row['share_of_limit']:.0%} {row['limit'].partition('_')[0]}",
            f"{row['peak_bytes'] / 1e6:.1f}", f"{row['host_us']:.0f}",
        ])  # fmt: skip
    return aligned(lines, 5)


def size(row: dict[str, Any]) -> str:
    return " x ".join(str(n) for n in row["sizes"].values())


def _key(row: dict[str, Any]) -> tuple:
    return row["operation"], size(row), row["dtype"], row["mode"]
