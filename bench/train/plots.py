"""Pictures of the steps and of the curves, narrow enough for a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from warpo.bench.train.rows import PHASES, Row, groups, timed  # noqa: E402
from warpo.bench.train.scaling import GROWS, exponent  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = {
    "sample": "#0072B2",
    "reward": "#F0E442",
    "score": "#CC79A7",
    "forward": "#E69F00",
    "backward": "#D55E00",
    "optimizer": "#009E73",
    "publish": "#000000",
    "verify": "#0B3C5D",
    "probe": "#56B4E9",
    "other": "#999999",
}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "savefig.dpi": 200,
}
WIDTH = 4.4  # inches: as wide as a phone's screen, letters of 9 points keep their size


def steps(rows: Sequence[Row], path: Path) -> bool:
    """Phases of a step as stacked bars, a panel for each job; False where nothing was timed."""
    panels = groups(timed(rows))
    if not panels:
        return False
    heights = [0.55 + 0.5 * len(panel) for panel in panels]
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            len(panels),
            figsize=(WIDTH, 0.9 + sum(heights)),
            squeeze=False,
            layout="constrained",
            height_ratios=heights,
        )
        for panel, place in zip(panels, axes[:, 0], strict=True):
            _bars(panel, place)
        axes[-1, 0].set_xlabel("seconds of a step (medians), by phase")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8
        )
        _save(figure, path)
    return True


def _bars(rows: Sequence[Row], axes: Any) -> None:
    """One bar a trainer: seconds by phase, and beside it what it comes to."""
    first = rows[0]
    left = [0.0] * len(rows)
    for phase in PHASES:
        seconds = [max(0.0, row["phases_s"].get(phase, 0.0)) for row in rows]
        axes.barh(
            range(len(rows)), seconds, left=left, color=COLORS[phase], label=phase, height=0.6
        )
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for y, (row, end) in enumerate(zip(rows, left, strict=True)):
        above = row["peak_above_imports_bytes"] / 2**20
        axes.text(
            end,
            y,
            f" {row['tokens_per_s']:.0f} tokens/s\n peak {above:.0f} MiB",
            va="center",
            fontsize=7.5,
        )
    axes.set_xlim(0, 1.42 * max(left))
    axes.set_yticks(range(len(rows)), [row["trainer"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    millions = first["weight_bytes"] / 4e6
    axes.set_title(
        f"{millions:.1f} M weights, {first['completions']} completions of {first['prompt_tokens']}"
        f" + {first['new_tokens']} tokens by {first['sampler']}",
        loc="left",
        fontsize=9,
    )


def scaling(rows: Sequence[Row], path: Path) -> bool:
    """Time and memory of the learner's step against each size, with their fits; likewise."""
    axes_of = {axis: [row for row in rows if row["axis"] == axis] for axis in GROWS}
    shown = {axis: found for axis, found in axes_of.items() if found}
    if not shown:
        return False
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            len(shown), figsize=(WIDTH, 2.7 * len(shown)), squeeze=False, layout="constrained"
        )
        for (axis, found), place in zip(shown.items(), axes[:, 0], strict=True):
            _curve(found, "ms", "time_fit", "time in ms", "#0072B2", place)
            _curve(found, "peak_bytes", "memory_fit", "peak memory in MB", "#D55E00", place)
            place.set(xscale="log", yscale="log", xlabel=GROWS[axis])
            sizes = [row["size"] for row in found]
            place.set_xticks(sizes, [f"{size:,}" for size in sizes])
            place.minorticks_off()
            place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            place.set_ylim(top=3.5 * place.get_ylim()[1])  # room for the legend
            place.legend(fontsize=8, frameon=False, loc="upper left")
        axes[0, 0].set_title("The learner's step", loc="left", fontsize=9)
        _save(figure, path)
    return True


def _curve(rows: Sequence[Row], key: str, fit: str, name: str, color: str, axes: Any) -> None:
    unit = 1.0 if key == "ms" else 1e6
    sizes = [row["size"] for row in rows]
    found = rows[0][fit]
    line = [found["coefficient"] * size ** found["exponent"] / unit for size in sizes]
    label = f"{name}: exponent {exponent(found).replace('+-', '±')}"
    axes.plot(sizes, line, color=color, linewidth=1.2, label=label)
    values = [row[key] / unit for row in rows]
    spread = None
    if key == "ms":
        spread = [
            [row["ms"] - row["p20_ms"] for row in rows],
            [row["p80_ms"] - row["ms"] for row in rows],
        ]
    axes.errorbar(sizes, values, yerr=spread, color=color, fmt="o", markersize=4, capsize=2)


def sync(rows: Sequence[Row], path: Path) -> bool:
    """Times of a weight sync beside a plain copy, a panel for each type of the sampler's weights;
    False where nothing was timed.
    """
    dtypes = list(dict.fromkeys(row["sampler_dtype"] for row in rows))
    if not dtypes:
        return False
    panels = [[row for row in rows if row["sampler_dtype"] == dtype] for dtype in dtypes]
    heights = [0.5 + 0.38 * len(panel) for panel in panels]
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            len(panels),
            figsize=(WIDTH, 0.4 + sum(heights)),
            squeeze=False,
            layout="constrained",
            height_ratios=heights,
            sharex=True,
        )
        for panel, place in zip(panels, axes[:, 0], strict=True):
            _sync_bars(sorted(panel, key=lambda row: -row["ms"]), place)
        axes[0, 0].set_xlim(0, 1.15 * max(row["ms"] for row in rows))
        axes[-1, 0].set_xlabel("ms until the sampler has the weights")
        _save(figure, path)
    return True


def _sync_bars(rows: Sequence[Row], axes: Any) -> None:
    """warpo's ways in blue, vLLM's loader in orange, the plain copy in grey."""
    loader, names = "load_weights", [row["provider"] for row in rows]
    colors = [
        "#999999" if name == "flat copy" else "#E69F00" if name.startswith(loader) else "#0072B2"
        for name in names
    ]
    labels = [name.replace(f"{loader}, ", f"{loader},\n") for name in names]
    axes.barh(labels, [row["ms"] for row in rows], color=colors, height=0.6)
    for y, row in enumerate(rows):
        axes.text(row["ms"], y, f" {row['ms']:.3g}", va="center", fontsize=8)
    axes.grid(axis="y", visible=False)
    millions = rows[0]["parameters"] / 1e6
    axes.set_title(
        f"{millions:.0f} M weights to {rows[0]['sampler_dtype']}", loc="left", fontsize=9
    )


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    pyplot.close(figure)
