"""The parts of README.md and docs/ that are made of the code and of bench/results.

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. tests/test_docs.py compares it.

    python -m tests.docs       # fills every part anew
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.kernels.operations import HELPERS, OPERATIONS, Operation
from tests.kernels.test_contract import PROMISES, why_not
from warpo.bench.control.__main__ import summaries
from warpo.bench.dropin.__main__ import summary_of
from warpo.bench.report import rows as report
from warpo.bench.train import rows as train
from warpo.engine.config import table
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import keys, sections
from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import Config
from warpo.kernels import ops
from warpo.kernels.objectives import OBJECTIVES, Objective

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def operations() -> str:
    """One row per operation: its name, which links to its reference, and what it computes."""
    return markdown(
        ["operation", "computes", "gradients to"],
        (
            [
                f"[`{o.name}`](reference.md#warpo.kernels.ops.{o.name})",
                _first_line(o.name),
                _names(o.differentiable),
            ]
            for o in OPERATIONS
        ),
    )


def helpers() -> str:
    return markdown(
        ["function", "returns"],
        (
            [f"[`{name}`](reference.md#warpo.kernels.ops.{name})", _first_line(name)]
            for name in HELPERS
        ),
    )


def settings(tree: type) -> str:
    """Every setting of a tree, a table per section."""
    found: dict[str, list[list[str]]] = {}
    for key in keys(tree).values():
        section = key.name.rpartition(".")[0]
        default = "required" if key.required else _shown(key.default)
        line = [f"`{key.name}`", default, key.wanted, key.text]
        found.setdefault(section, []).append([cell.replace("|", r"\|") for cell in line])
    head = ["setting", "default", "values", ""]
    return "\n\n".join(
        (f"### {name}\n\n{' '.join(sections(tree)[name].split())}\n\n" if name else "")
        + markdown(head, lines)
        for name, lines in found.items()
    )


def _shown(default: Any) -> str:
    if default == "":
        return "empty"
    parts = default if isinstance(default, tuple) else (default,)
    text = " ".join(str(part) for part in parts)
    return f"`{text.lower() if isinstance(default, bool) else text}`"


def reference() -> str:
    """A directive of mkdocstrings for everything public."""
    classes = sorted(name for name in ops.__all__ if name[0].isupper() and not name.isupper())
    named = [operation.name for operation in OPERATIONS] + [*HELPERS] + classes
    return "\n\n".join(f"::: warpo.kernels.ops.{name}" for name in named)


def _first_line(name: str) -> str:
    text = inspect.getdoc(getattr(ops, name)).partition("\n\n")[0]
    return " ".join(text.split()).rstrip(".").replace("|", r"\|")


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def contract() -> str:
    """One row per operation: what is promised and tested, by number; and why the rest is not."""
    reasons: dict[str, str] = {}
    lines = []
    for operation in OPERATIONS:
        cells = [_cell(operation, promise, reasons) for promise in PROMISES]
        lines.append([f"`{operation.name}`", *cells])
    promises = "\n".join(f"{number}. {text}" for number, text in PROMISES.items())
    legend = "\n".join(f"- **{letter}**: {reason}" for reason, letter in reasons.items())
    return f"{promises}\n\n{markdown(['', *map(str, PROMISES)], lines)}\n\n{legend}"


def _cell(operation: Operation, promise: int, reasons: dict[str, str]) -> str:
    """A tick where a test holds a backend to it, else the letter of the reason."""
    why = [why_not(operation, promise, backend) for backend in ("cpu", "triton", "cuda")]
    if None in why:
        return "✓"
    return reasons.setdefault(str(why[0]), chr(ord("a") + len(reasons)))


def objectives() -> str:
    lines = []
    for name, objective in OBJECTIVES.items():
        title = f"[`{name}`]({ALGORITHMS[name].url})" if name in ALGORITHMS else f"`{name}`"
        lines.append([title, *_parts(objective)])
    head = ["objective", "ratio", "surrogate", "bounds", "KL", "correction", "mean"]
    return markdown(head, lines)


def _parts(objective: Objective) -> list[str]:
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    surrogate = objective.surrogate.replace("_", " ")
    unbounded = ("none", "reinforce", "soft gate", "gamma")
    bounds = (
        "" if surrogate in unbounded or (low, high) == (0, float("inf")) else _bounds(low, high)
    )
    kl = f"{objective.kl_coef:g} {objective.kl_estimator}" if objective.kl_coef else ""
    if kl and objective.kl_level == "sequence":
        kl += " of sequences"
    correction = "" if objective.correction == "none" else objective.correction
    if correction:
        correction += f" {objective.correction_level}s" if objective.correction_level else ""
        correction += f" {_bounds(objective.correction_low, objective.correction_high)}"
    ratio = {"prefix": "tokens so far", "product": "sequence, product"}
    level = ratio.get(objective.ratio_level, objective.ratio_level)
    return [level, surrogate, bounds, kl, correction, objective.aggregation]


def _bounds(low: float, high: float) -> str:
    return f"{low:.5g} to {high:.5g}" if low else f"up to {high:.5g}"


def kernel_times() -> str:
    """The largest mode of each case: forward and backward where there is one."""
    entries = report.summary(rows("cpu-epyc-2-cores/bench"))
    both = {_case(entry) for entry in entries if entry["mode"] == "fwd+bwd"}
    lines = [
        [
            *(entry[name] for name in ("operation", "size", "dtype", "mode")),
            f"{entry['ms']:.3g}",
            *(report.against(entry, name) for name in ("eager", "compile", "other")),
            report.share_of_limit(entry["share"], entry["limit"]),
        ]
        for entry in entries
        if entry["mode"] == "fwd+bwd" or _case(entry) not in both
    ]
    head = ["operation", "size", "dtype", "mode", "ms"]
    head += ["× PyTorch", "× torch.compile", "× best other", "of the limit"]
    return markdown(head, lines)


def _case(entry: Row) -> tuple[str, str, str]:
    return entry["operation"], entry["size"], entry["dtype"]


def jobs() -> list[dict[str, Row]]:
    """Steps by trainer, of each job."""
    found = train.groups(rows("train-epyc-2-cores/train"))
    return [{row["trainer"]: row for row in group} for group in found]


def _title(row: Row) -> str:
    millions = row["weight_bytes"] / 4e6
    tokens = f"{row['prompt_tokens']} + {row['new_tokens']} tokens"
    return f"{millions:.1f} M weights, {row['completions']} completions of {tokens}"


def step_times() -> str:
    """A GRPO step of each trainer by phase, ms, sampled by vLLM."""
    lines = []
    for job in jobs():
        for trainer, row in job.items():
            if row["sampler"] == "vllm":
                lines.append([_title(row) if trainer == "warpo" else "", trainer, *_phases(row)])
    head = ["job", "trainer", "sample", "old logprobs", "forward + backward", "weights to vLLM"]
    head += ["proof", "whole step", "CPU time", "tokens/s", "peak MiB above the imports"]
    return markdown(head, lines)


def _phases(row: Row) -> list[str]:
    def ms(*names: str) -> float:
        return 1e3 * sum(row["phases_s"].get(name, 0.0) for name in names)

    return [
        f"{ms('sample'):.0f}",
        f"{ms('score'):.0f}",
        f"{ms('forward', 'backward'):.0f}",
        f"{ms('publish'):.1f}",
        f"{ms('verify', 'probe'):.0f}" if row["trainer"] == "warpo" else "",
        f"{1e3 * row['step_s']:.0f}",
        f"{1e3 * row['step_cpu_s']:.0f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['peak_above_imports_bytes'] / 2**20:.0f}",
    ]


def step_shares() -> str:
    """warpo's step as a share of TRL's, of each job and sampler."""
    lines = []
    for job in jobs():
        mine = job["warpo"]
        shares = [
            f"{mine[key] / job[other][key]:.2f}"
            for other in ("trl", "trl tuned")
            for key in ("step_s", "step_cpu_s")
        ]
        lines.append([_title(mine), mine["sampler"], *shares])
    head = ["job", "sampler", "time", "CPU time", "time, tuned TRL", "CPU time, tuned TRL"]
    return markdown(head, lines)


def publish_times() -> str:
    found: dict[str, dict[str, float]] = {}
    for row in rows("train-epyc-2-cores/resync"):
        found.setdefault(row["provider"], {})[row["sampler_dtype"]] = row["ms"]
    titles = {
        "alias": "alias",
        "packed copy": "packed copy",
        "flat copy": "a flat copy of as many bytes",
        "load_weights, all tensors": "vLLM's `load_weights`, all tensors",
        "load_weights, tensor by tensor": "vLLM's `load_weights`, tensor by tensor",
    }
    lines = [
        [title, *(f"{ms:.0f}" if ms > 1 else f"{ms:.3f}" for ms in found[name].values())]
        for name, title in titles.items()
    ]
    lines = [[*line, *[""] * (3 - len(line))] for line in lines]
    return markdown(["one publish, ms", "float32 sampler", "bfloat16 sampler"], lines)


def control() -> str:
    found = summaries(rows("control-epyc-2-cores/control"))
    names = {"sac": "SAC", "ppo_gymnasium": "PPO", "trpo_gymnasium": "TRPO"}
    lines = []
    for algorithm, name in names.items():
        sides = [found[algorithm, side] for side in ("warpo", "stable-baselines3")]
        title = f"{sides[0]['environment']}, {name}, {sides[0]['seeds']} seeds"
        for figure, key in (
            (f"{title}: last return", "return"),
            ("mean of the evaluations on the way", "curve_mean"),
            ("CPU seconds of the run", "cpu_s"),
        ):
            lines.append([figure, *(_spread(x[key], x[f"{key}_std"]) for x in sides)])
    return markdown(["", "warpo", "Stable-Baselines3"], lines)


def _spread(mean: float, deviation: float) -> str:
    digits = 0 if abs(mean) >= 100 else 1
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def dropin() -> str:
    text = summary_of(rows("dropin-epyc-2-cores/dropin"))
    return "\n".join(re.sub(r" +", " ", line).strip() for line in text.splitlines())


def patched_trl() -> str:
    """A step of a real GRPOTrainer without and with the patch."""
    sides = [rows(f"dropin-epyc-2-cores/{name}") for name in ("grpo_trainer_bf16", "grpo_trainer")]
    figures: dict[str, tuple[Callable[[Row], float], str]] = {
        "seconds": (lambda row: row["step_s"], "{:.3f}"),
        "forward": (lambda row: row["phases_s"]["forward"], "{:.3f}"),
        "backward": (lambda row: row["phases_s"]["backward"], "{:.3f}"),
        "peak memory, MiB": (lambda row: row["peak_bytes"] / 2**20, "{:.0f}"),
    }
    lines = []
    for name, (figure, text) in figures.items():
        cells = []
        for theirs, ours in sides:
            before, after = figure(theirs), figure(ours)
            cells += [text.format(before), text.format(after), f"{before / after:.2f}"]
        lines.append([name, *cells])
    head = ["a step", "TRL, bf16", "with warpo", "ratio", "TRL, float32", "with warpo", "ratio"]
    return markdown(head, lines)


def headline() -> str:
    """Three measured numbers, each with its run."""
    entries = report.summary(rows("cpu-epyc-2-cores/bench"))
    ratios = {
        name: [entry["ratios"][name] for entry in entries if name in entry["ratios"]]
        for name in ("eager", "compile", "other")
    }
    means = [statistics.geometric_mean(ratios[name]) for name in ratios]
    shares = [
        job["warpo"]["step_s"] / job["trl"]["step_s"]
        for job in jobs()
        if job["warpo"]["sampler"] == "vllm"
    ]
    theirs, ours = rows("dropin-epyc-2-cores/grpo_trainer_bf16")
    return "\n".join(
        [
            f"- **Kernels: {means[0]:.1f}×** as fast as PyTorch ({min(ratios['eager']):.1f} to "
            f"{max(ratios['eager']):.0f}), {means[1]:.1f}× torch.compile and {means[2]:.1f}× the "
            "best other library: geometric means over the cases of "
            "[`make bench`](bench/results/cpu-epyc-2-cores/bench.jsonl).",
            f"- **A GRPO step: {min(shares):.2f} to {max(shares):.2f}** of the time of TRL's with "
            "the same vLLM in its process, models of 1.7 and 21 million weights: "
            "[`make bench-train`](bench/results/train-epyc-2-cores/train.jsonl).",
            f"- **One line in TRL: {theirs['step_s'] / ours['step_s']:.1f}×.** A step of a real "
            f"`GRPOTrainer` falls from {theirs['step_s']:.2f} to {ours['step_s']:.2f} s once it is "
            "patched: [20 steps](bench/results/dropin-epyc-2-cores/grpo_trainer_bf16.jsonl).",
        ]
    )


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "algorithms": table.markdown,
    "comparison": table.comparison,
    "operations": operations,
    "helpers": helpers,
    "contract": contract,
    "settings of sampled completions": partial(settings, Config),
    "settings of given data": partial(settings, OfflineConfig),
    "settings of gymnasium": partial(settings, ControlConfig),
    "reference": reference,
    "objectives": objectives,
    "kernel times": kernel_times,
    "step times": step_times,
    "step shares": step_shares,
    "publish times": publish_times,
    "control": control,
    "drop-in times": dropin,
    "patched TRL": patched_trl,
}


def filled(text: str) -> str:
    """A page with its parts made anew.

    Raises:
        KeyError: it has a part that no function here makes.
    """

    def part(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{PARTS[match[1]]()}\n\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([\w -]+) -->.*?<!-- /\1 -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if text != filled(text):
            page.write_text(filled(text))
            print(page.relative_to(ROOT))
