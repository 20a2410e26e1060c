"""Plots of the rows, as PNG."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from warpo.bench.report.rows import Row, elements, size, summary, timed  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart; warpo's backends in blue and green
COLORS = {
    "cpu": "#0072B2", "triton": "#009E73", "cuda": "#0072B2", "eager": "#E69F00",
    "compile": "#D55E00", "trl": "#CC79A7", "verl": "#7A5195", "torchrl": "#8C564B",
    "openrlhf": "#56B4E9", "liger": "#666666", "flash-attn": "#999933", "quack": "#332288",
}  # fmt: skip
_REST = ("#444444", "#888888", "#AA7733", "#77AA33")
NAMES = {"eager": "PyTorch", "compile": "torch.compile", "cpu": "warpo", "other": "other library"}
_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
          "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 130}  # fmt: skip


def operation(rows: Sequence[Row], dtype: str, mode: str) -> bytes | None:
    """Time, and share of the limit, of one operation against its size; None without rows."""
    rows = [row for row in timed(rows) if row["dtype"] == dtype and row["mode"] == mode]
    if not rows:
        return None
    if len({elements(row) for row in rows}) == 1:
        return _bars(rows)
    with pyplot.rc_context(_STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
        for number, name in enumerate(dict.fromkeys(row["provider"] for row in rows)):
            mine = sorted((r for r in rows if r["provider"] == name), key=elements)
            x = [elements(row) for row in mine]
            style: dict[str, Any] = {
                "color": _color(name, number), "marker": "o",
                "markersize": 4, "linewidth": 2.0 if name in ("cpu", "triton", "cuda") else 1.2,
                "label": NAMES.get(name, name), "clip_on": False,
            }  # fmt: skip
            low = [row["ms"] - row["p20_ms"] for row in mine]
            high = [row["p80_ms"] - row["ms"] for row in mine]
            left.errorbar(x, [row["ms"] for row in mine], yerr=[low, high], capsize=2, **style)
            right.plot(x, [100 * row["share_of_limit"] for row in mine], **style)
        limits = sorted({(elements(row), row["limit_ms"]) for row in rows})
        left.plot(*zip(*limits, strict=True), "k--", linewidth=1, marker="_", label="limit")
        right.axhline(100, color="k", linestyle="--", linewidth=1)
        sizes = " x ".join(rows[0]["sizes"])
        for axes, label in ((left, "milliseconds a call"), (right, "% of the limit")):
            axes.set(xscale="log", yscale="log", xlabel=sizes, ylabel=label)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.set_title(f"{rows[0]['operation']}, {mode}, {dtype}", loc="left", fontsize=9)
        left.legend(fontsize=7, frameon=False)
        return _png(figure)


def _color(name: str, number: int) -> str:
    return COLORS.get(name, _REST[number % len(_REST)])


def _bars(rows: Sequence[Row]) -> bytes:
    """Time of each provider, and of the limit, at the only size that there is."""
    rows = sorted(rows, key=lambda row: -row["ms"])
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(7.2, 1.0 + 0.3 * len(rows)), layout="constrained")
        names = [row["provider"] for row in rows]
        colors = [_color(name, number) for number, name in enumerate(names)]
        spread = [
            [row["ms"] - row["p20_ms"] for row in rows],
            [row["p80_ms"] - row["ms"] for row in rows],
        ]
        axes.barh(range(len(rows)), [row["ms"] for row in rows], xerr=spread, color=colors)
        axes.axvline(rows[0]["limit_ms"], color="k", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="milliseconds a call (dashed: the limit)")
        axes.set_yticks(range(len(rows)), [NAMES.get(name, name) for name in names])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        title = f"{rows[0]['operation']} {size(rows[0])}, {rows[0]['mode']}, {rows[0]['dtype']}"
        axes.set_title(title, loc="left", fontsize=9)
        return _png(figure)


def overview(rows: Sequence[Row]) -> bytes | None:
    """How many times as fast warpo is as each of the others, one line an operation: the largest
    size of each, in the dtype and mode that do the most.
    """
    last: dict[str, Row] = {}
    for entry in summary(rows):
        if entry["ratios"]:
            last[entry["operation"]] = entry
    if not last:
        return None
    entries = list(last.values())[::-1]
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            figsize=(7.2, 1.1 + 0.27 * len(entries)), layout="constrained"
        )
        colors = {"eager": COLORS["eager"], "compile": COLORS["compile"], "other": COLORS["verl"]}
        for name, marker in (("eager", "o"), ("compile", "s"), ("other", "D")):
            points = [(e["ratios"][name], y) for y, e in enumerate(entries) if name in e["ratios"]]
            style: Any = {"marker": marker, "color": colors[name], "zorder": 3}
            if points:
                axes.scatter(*zip(*points, strict=True), label=f"against {NAMES[name]}", **style)
        for y, entry in enumerate(entries):
            axes.hlines(y, 1, max(entry["ratios"].values()), color="#bbbbbb", linewidth=1)
        axes.axvline(1, color="k", linewidth=1)
        axes.set(xscale="log", xlabel="warpo is so many times as fast",
                 ylim=(-0.7, len(entries) - 0.3))  # fmt: skip
        axes.set_yticks(range(len(entries)), [
            f"{e['operation']} {'forward' if e['mode'] == 'fwd' else e['mode']}" for e in entries
        ])  # fmt: skip
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.legend(fontsize=8, frameon=False, loc="upper center", ncols=3,
                    bbox_to_anchor=(0.4, 1.0 + 0.9 / len(entries)))  # fmt: skip
        return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()
