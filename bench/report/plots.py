"""Plots of the rows, as PNG."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from warpo.bench.report.rows import WARPO, Row, elements, size, summary, timed  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart; warpo's backends in blue and green
COLORS = {
    "cpu": "#0072B2",
    "triton": "#009E73",
    "cuda": "#0072B2",
    "eager": "#E69F00",
    "compile": "#D55E00",
    "trl": "#CC79A7",
    "verl": "#7A5195",
    "torchrl": "#8C564B",
    "openrlhf": "#56B4E9",
    "liger": "#666666",
    "flash-attn": "#999933",
    "quack": "#332288",
    "warpo, in place": "#4C9BCF",
}
_REST = ("#444444", "#888888", "#AA7733", "#77AA33")
NAMES = {"eager": "PyTorch", "compile": "torch.compile", "cpu": "warpo", "other": "other library"}
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 130,
}


def operation(rows: Sequence[Row]) -> dict[str, bytes]:
    """Pictures of one operation, by dtype and mode: time, and share of the limit, against its size;
    of all of them in one where there is one size.
    """
    rows = timed(rows)
    kinds = list(dict.fromkeys((row["dtype"], row["mode"]) for row in rows))
    if len({elements(row) for row in rows}) <= 1:
        return {"": _bars(rows, kinds)} if rows else {}
    return {
        f"-{dtype}-{mode.replace('+', '-')}": _curves(
            [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        )
        for dtype, mode in kinds
    }


def _curves(rows: Sequence[Row]) -> bytes:
    with pyplot.rc_context(_STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
        for number, name in enumerate(dict.fromkeys(row["provider"] for row in rows)):
            mine = sorted((r for r in rows if r["provider"] == name), key=elements)
            x = [elements(row) for row in mine]
            style: dict[str, Any] = {
                "color": _color(name, number),
                "marker": "o",
                "markersize": 4,
                "linewidth": 2.0 if name in WARPO else 1.2,
                "label": NAMES.get(name, name),
                "clip_on": False,
            }
            left.errorbar(x, [row["ms"] for row in mine], yerr=_spread(mine), capsize=2, **style)
            right.plot(x, [100 * row["share_of_limit"] for row in mine], **style)
        limits = sorted({(elements(row), row["limit_ms"]) for row in rows})
        left.plot(*zip(*limits, strict=True), "k--", linewidth=1, marker="_", label="limit")
        right.axhline(100, color="k", linestyle="--", linewidth=1)
        sizes = " x ".join(rows[0]["sizes"])
        for axes, label in ((left, "milliseconds a call"), (right, "% of the limit")):
            axes.set(xscale="log", yscale="log", xlabel=sizes, ylabel=label)
            _label(axes.xaxis, axes.get_xlim(), EngFormatter(sep=""))
            _label(axes.yaxis, axes.get_ylim(), _PLAIN)
        title = f"{rows[0]['operation']}, {rows[0]['mode']}, {rows[0]['dtype']}"
        left.set_title(title, loc="left", fontsize=9)
        left.legend(fontsize=7, frameon=False)
        return _png(figure)


def _label(axis: Any, ends: tuple[float, float], formatter: Any) -> None:
    """Numbers on a logarithmic axis: 1, 2 and 5 of each decade where there are few."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ends[1] < 300 * ends[0] else (1,)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _color(name: str, number: int) -> str:
    return COLORS.get(name, _REST[number % len(_REST)])


def _spread(rows: Sequence[Row]) -> list[list[float]]:
    return [
        [row["ms"] - row["p20_ms"] for row in rows],
        [row["p80_ms"] - row["ms"] for row in rows],
    ]


def _bars(rows: Sequence[Row], kinds: Sequence[tuple[str, str]]) -> bytes:
    """Time of each provider at the only size that there is, one block for each dtype and mode, with
    its limit.
    """
    blocks = [
        sorted((r for r in rows if (r["dtype"], r["mode"]) == kind), key=lambda row: row["ms"])
        for kind in kinds
    ]
    lines = len(rows) + len(blocks)
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(7.2, 0.9 + 0.2 * lines), layout="constrained")
        labels: list[tuple[int, str]] = []
        headings = []
        y = 0
        for (dtype, mode), block in zip(kinds, blocks, strict=True):
            headings.append(len(labels))
            labels.append((y, f"{dtype}, {mode}"))
            places = range(y + 1, y + 1 + len(block))
            axes.barh(
                places,
                [row["ms"] for row in block],
                xerr=_spread(block),
                color=[_color(row["provider"], n) for n, row in enumerate(block)],
            )
            axes.vlines(block[0]["limit_ms"], y + 0.4, places[-1] + 0.6, color="k", linewidth=1.5)
            names = [str(NAMES.get(row["provider"], row["provider"])) for row in block]
            labels += zip(places, names, strict=True)
            y = places[-1] + 1
        axes.set(xscale="log", xlabel="milliseconds a call; black: the limit", ylim=(y - 0.4, -0.6))
        axes.set_yticks(*zip(*labels, strict=True))
        for number in headings:
            axes.get_yticklabels()[number].set_fontweight("bold")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        _label(axes.xaxis, axes.get_xlim(), _PLAIN)
        axes.set_title(f"{rows[0]['operation']} {size(rows[0])}", loc="left", fontsize=9)
        return _png(figure)


def overview(rows: Sequence[Row]) -> bytes | None:
    """Speed-up of warpo over each of the others, one line per operation: the largest
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
            figsize=(7.2, 1.3 + 0.27 * len(entries)), layout="constrained"
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
        axes.set(xscale="log", xlabel="speed-up of warpo", ylim=(-0.7, len(entries) - 0.3))
        axes.set_yticks(
            range(len(entries)),
            [f"{e['operation']} {'forward' if e['mode'] == 'fwd' else e['mode']}" for e in entries],
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.legend(
            fontsize=8,
            frameon=False,
            loc="upper center",
            ncols=3,
            bbox_to_anchor=(0.4, 1.0 + 0.4 / len(entries)),
            borderaxespad=0,
        )
        return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()
