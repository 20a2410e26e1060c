"""The rows as aligned text."""

from collections.abc import Sequence

from warpo.bench.environment import aligned
from warpo.bench.report.rows import Row, key, problems, shown, size

HEAD = ["operation", "size", "dtype", "mode", "provider", "ms", "p20 to p80", "x eager", "of limit",
        "peak MB", "host us"]  # fmt: skip


def text(rows: Sequence[Row]) -> str:
    """One line a row; below, why providers have no time."""
    eager = {key(row): row.get("ms") for row in rows if row["provider"] == "eager"}
    lines = [HEAD]
    for row in shown(rows):
        line = [row["operation"], size(row), row["dtype"], row["mode"], row["provider"]]
        if "problem" in row:
            lines.append([*line, "no time", *[""] * (len(HEAD) - len(line) - 1)])
            continue
        base = eager.get(key(row))
        lines.append([
            *line, f"{row['ms']:.4g}", f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
            f"{base / row['ms']:.1f}" if base else "",
            f"{row['share_of_limit']:.0%} {row['limit'].partition('_')[0]}",
            f"{row['peak_bytes'] / 1e6:.1f}", f"{row['host_us']:.0f}" if "host_us" in row else "",
        ])  # fmt: skip
    notes = [f"{reason} ({', '.join(where)})" for reason, where in problems(shown(rows)).items()]
    absent = sorted({row["provider"] for row in rows} - {row["provider"] for row in shown(rows)})
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    return "\n".join([aligned(lines, 5), *([""] if notes else []), *notes])
