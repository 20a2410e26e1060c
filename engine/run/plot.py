"""The learning curves of a run as one picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from matplotlib.figure import Figure

from warpo.engine.run.log import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _INK, _GRID = "#2563a8", "#d9730d", "#333333", "#e3e3e3"
_DPI = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: its title and the (metric, name in the legend) of each curve."""

    title: str
    curves: tuple[tuple[str, str], ...]
    limits: tuple[float | None, float | None] = (None, None)


PANELS = (
    Panel("mean reward", (("reward/mean", "train"),)),
    Panel(
        "accuracy",
        (("reward/accuracy", "train"), ("eval/accuracy", "held out")),
        limits=(-0.02, 1.02),
    ),
    Panel("KL (nats per token)", (("kl/mean", "train"),)),
    Panel("clip fraction", (("ratio/clip_frac", "train"),), limits=(0, None)),
    Panel("entropy (nats per token)", (("entropy/mean", "train"),)),
    Panel("seconds per step", (("perf/step_s", "train"),), limits=(0, None)),
)


def plot_run(metrics_path: str | Path, panels: Sequence[Panel] = PANELS, title: str = "") -> Path:
    """Draw learning.png next to a metrics.jsonl: six panels. Without a title config.yaml, if it is
    there too, gives it.

    Training metrics of 20 steps or more are drawn twice: each step faintly, and their running
    mean. Evaluations are drawn as they are.

    Args:
        panels: six.

    Returns:
        Path of the picture, 1400 x 800 pixels.

    Raises:
        ValueError: the file has no rows.
    """
    path = Path(metrics_path)
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no rows: there is nothing to draw")
    figure = Figure(figsize=(1400 / _DPI, 800 / _DPI), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(title or _title(path, rows), fontsize=14, color=_INK)
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        _draw(axes, panel, rows)
    picture = path.with_name("learning.png")
    figure.savefig(picture)
    return picture


def _title(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    settings_path = path.with_name("config.yaml")
    steps = f"{rows[-1]['step']} steps"
    if not settings_path.exists():
        return f"{path.parent.name}, {steps}"
    settings = yaml.safe_load(settings_path.read_text(encoding="utf-8"))
    parts = [settings["model"], settings["algorithm"]]
    if "sampler" in settings:
        parts.append(f"sampled by {settings['sampler']}")
    return ", ".join([*parts, steps])


def _draw(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]]) -> None:
    drawn = 0
    for (metric, name), color in zip(panel.curves, (_BLUE, _ORANGE), strict=False):
        # row 0 is an evaluation of the model that the first step starts from
        points = [
            (row["step"], row[metric])
            for row in rows
            if row.get(metric) is not None and (row["step"] or metric.startswith("eval/"))
        ]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        drawn += 1
        if len(points) >= 20 and not metric.startswith("eval/"):
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axes.plot(steps, _running_mean(values), color=color, linewidth=2, label=name)
        else:
            axes.plot(steps, values, color=color, linewidth=2, marker="o", ms=4, label=name)
    axes.set_title(panel.title, fontsize=12, color=_INK, loc="left")
    axes.set_xlabel("step", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    last = rows[-1]["step"]
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_ylim(*panel.limits)
    if len(panel.curves) > 1 and drawn:
        axes.legend(frameon=False, loc="lower right")
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", ha="center", color=_INK, transform=axes.transAxes)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the values around each; a twentieth of the run on both sides."""
    reach = max(1, math.ceil(len(values) / 20))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
