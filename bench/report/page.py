"""One self-contained HTML page of a run, and its plots as PNG."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from warpo.bench.report import plots
from warpo.bench.report.rows import (
    Row,
    against,
    figures,
    groups,
    ours,
    problems,
    share_of_limit,
    shown,
    size,
    summary,
)


def write(rows: Sequence[Row], out: Path) -> str:
    """Writes OUT/index.html and OUT/*.png; returns where they are."""
    pictures: dict[str, str] = {}

    def keep(name: str, png: bytes | None) -> None:
        if png is not None:
            (out / f"{name}.png").write_bytes(png)
            pictures[name] = "data:image/png;base64," + base64.b64encode(png).decode()

    keep("overview", plots.overview(rows))
    sections = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        mine = [row for row in rows if row["operation"] == operation]
        slug = operation.replace(", ", "-").replace(" ", "-")
        found = plots.operation(mine)
        for kind, png in found.items():
            keep(f"{slug}{kind}", png)
        sections.append(
            {
                "name": operation,
                "slug": slug,
                "rows": [_cells(row, mine) for row in shown(mine)],
                "pictures": [pictures[f"{slug}{kind}"] for kind in found],
            }
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html").render(
        overview=pictures.get("overview"),
        sections=sections,
        tiles=figures(rows),
        summary=[_summary_cells(entry) for entry in summary(rows)],
        run=rows[0],
        limits=_limits(rows[0]["limits"]),
        problems=problems(rows),
        cold=any(row.get("cache") == "cold" for row in rows),
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return f"rows {out / 'bench.jsonl'}, plots {out / '*.png'}, page {out / 'index.html'}"


def _summary_cells(entry: Row) -> dict[str, Any]:
    return entry | {
        "ms": f"{entry['ms']:.3g}",
        **{name: against(entry, name) for name in ("eager", "compile", "other")},
        "share": share_of_limit(entry["share"], entry["limit"]),
    }


def _cells(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    cells = {"size": size(row), **{k: row[k] for k in ("dtype", "mode", "provider")}}
    if "problem" in row:
        return cells | {"problem": row["problem"]}
    mine = ours(next(g for g in groups(rows).values() if row in g.values()))
    return cells | {
        "ms": f"{row['ms']:.4g}",
        "spread": f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
        "ratio": f"{row['ms'] / mine['ms']:.1f}" if mine and mine is not row else "",
        "share": share_of_limit(row["share_of_limit"], row["limit"]),
        "peak": f"{row['peak_bytes'] / 1e6:.1f}",
        "host": f"{row['host_us']:.0f}" if "host_us" in row else "",
        "error": f"{row['error']:.0e}",
    }


def _limits(limits: dict[str, float]) -> list[tuple[str, str]]:
    units = {
        "read": "GB/s read",
        "copy": "GB/s copied",
        "exp": "billion exponentials a second",
        "matrix": "GFLOP/s",
    }
    found = []
    for name, value in limits.items():
        kind, _, detail = name.partition("_")
        over = f" over {detail.removesuffix('MiB')} MiB" if detail.endswith("MiB") else ""
        of = f" of {detail}" if kind == "matrix" else ""
        found.append((f"{value / 1e9:.3g}", f"{units[kind]}{over}{of}"))
    return found
