"""`warpo kl`: estimators of the KL from samples, in numbers and as a picture.

    policy N(0, 1), reference N(mu, 1), x ~ policy, d = log reference(x) - log policy(x)

    KL(policy || reference) = mu^2 / 2 = E[-d] = E[e^d - 1 - d]      k1, k3; k2 = d^2 / 2 is biased
    KL(reference || policy) = mu^2 / 2 = E[d e^d] = E[d e^d - (e^d - 1)]      naive, reverse_k3

Source: John Schulman, Approximating KL divergence, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from warpo.kernels import ops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DESCRIPTION = """\
Schulman's experiment: the KL of two normal distributions from samples of one of them, the policy.
k1, k2 and k3 estimate KL(policy || reference); r log r and reverse_k3 estimate
KL(reference || policy) from the same samples. All but r log r are warpo.kernels.ops.approx_kl.

    warpo kl                                # means 0.1 and 1, as in the experiment
    warpo kl --means 0.5 2 --samples 100000

Bias and standard deviation are in units of the KL. The picture has both as functions of the KL,
from an integral instead of samples.
"""
MIN_SAMPLES = 100
COLORS = {
    "k1": "#2563a8",
    "k2": "#d9730d",
    "k3": "#2a8c4a",
    "r log r": "#8c8c8c",
    "reverse_k3": "#a3328f",
}
_INK, _GRID = "#333333", "#e3e3e3"
# nodes of the quadrature; 120 give Schulman's table to 12 digits
_NODES = 200


def _kernel(name: str) -> Callable[[Tensor], Tensor]:
    return lambda d: ops.approx_kl(torch.zeros_like(d), d, name)


class Estimator(NamedTuple):
    """of what, and the value at a sample with log ratio d = log reference - log policy."""

    of: str
    value: Callable[[Tensor], Tensor]


ESTIMATORS = {
    "k1": Estimator("policy || reference", _kernel("k1")),
    "k2": Estimator("policy || reference", _kernel("k2")),
    "k3": Estimator("policy || reference", _kernel("k3")),
    "r log r": Estimator("reference || policy", lambda d: d * d.exp()),
    "reverse_k3": Estimator("reference || policy", _kernel("reverse_k3")),
}


class Moments(NamedTuple):
    """Of an estimator, in units of the KL."""

    bias: float
    std: float


def sampled(estimator: Estimator, mean: float, samples: int, seed: int) -> Tensor:
    """An estimate from each of some samples of the policy N(0, 1), against N(mean, 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, generator=generator, dtype=torch.float64)
    return estimator.value((mean * x - mean**2 / 2).float()).double()


def moments_of(values: Tensor, mean: float) -> Moments:
    """Of estimates from samples."""
    kl = mean**2 / 2
    return Moments((values.mean() / kl - 1).item(), (values.std() / kl).item())


def integrated(estimator: Estimator, mean: float) -> Moments:
    """By Gauss-Hermite quadrature instead of samples."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights /= weights.sum()
    values = estimator.value(torch.from_numpy(mean * nodes - mean**2 / 2).float()).double().numpy()
    kl, expectation = mean**2 / 2, float(weights @ values)
    variance = float(weights @ (values - expectation) ** 2)
    return Moments(expectation / kl - 1, variance**0.5 / kl)


def table(mean: float, samples: int, seed: int) -> Table:
    """One row for each estimator."""
    title = (
        f"policy N(0, 1), reference N({mean:g}, 1): KL {mean**2 / 2:g} nats, {samples:,} samples"
    )
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("estimator")
    found.add_column("of")
    for name in ("bias / KL", "std / KL", "below 0"):
        found.add_column(name, justify="right")
    for name, estimator in ESTIMATORS.items():
        values = sampled(estimator, mean, samples, seed)
        moments, negative = moments_of(values, mean), (values < 0).double().mean().item()
        cells = (f"{moments.bias:+.4f}", f"{moments.std:.3f}", f"{100 * negative:.0f} %")
        found.add_row(name, f"KL({estimator.of})", *cells)
    return found


def draw(path: Path) -> None:
    """Three panels: each estimator of a sample, its bias and its standard deviation."""
    figure = Figure(figsize=(15, 5), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(
        "KL of two normal distributions of variance 1, from one sample of the policy",
        fontsize=14,
        color=_INK,
    )
    value, bias, std = figure.subplots(1, 3)
    d = torch.linspace(-1.5, 1.5, 201)
    means = np.geomspace(0.05, 2, 60)
    for name, estimator in ESTIMATORS.items():
        moments = [integrated(estimator, mean) for mean in means]
        style = {"color": COLORS[name], "linewidth": 2, "label": f"{name}: KL({estimator.of})"}
        style["linestyle"] = "--" if estimator.of.startswith("reference") else "-"
        value.plot(d, estimator.value(d), **style)
        bias.plot(means**2 / 2, [m.bias for m in moments], **style)
        std.plot(means**2 / 2, [m.std for m in moments], **style)
    value.legend(frameon=False, fontsize=9)
    bias.set_xscale("log")
    std.set_xscale("log")
    std.set_yscale("log")
    _label(value, "estimate (nats)", "d = log reference - log policy")
    _label(bias, "bias / KL", "KL (nats)")
    _label(std, "standard deviation / KL", "KL (nats)")
    figure.savefig(path)


def _label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=12, color=_INK, loc="left")
    axes.set_xlabel(x, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="warpo kl",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--means", nargs="+", type=float, default=[0.1, 1.0], metavar="MU")
    parser.add_argument("--samples", type=int, default=1_000_000, help="default 1000000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kl.png"), help="default kl.png")
    options = parser.parse_args(words)
    for mean in options.means:
        if not 0 < abs(mean) <= 4:
            parser.error(
                f"--means {mean:g}: |MU| must be above 0, where both are one distribution, and at "
                "most 4: beyond it the samples that decide are too rare to be drawn"
            )
    if options.samples < MIN_SAMPLES:
        parser.error(f"--samples {options.samples}: at least {MIN_SAMPLES}")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no directory {options.out.parent}")
    return options


def main(words: Sequence[str]) -> int:
    """`warpo kl`; its exit status."""
    options = parse(words)
    console = Console()
    for mean in options.means:
        console.print(table(mean, options.samples, options.seed), highlight=False)
    draw(options.out)
    console.print(f"picture: {options.out}", highlight=False)
    return 0
