"""`warpo algorithms`: the table of algorithms.py for a terminal, as Markdown, or one row."""

from __future__ import annotations

import math
import textwrap

from rich import box
from rich.console import Console
from rich.table import Table

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.effects import has_effect
from warpo.engine.config.offline import LOSS_KEYS
from warpo.kernels.objectives import Objective
from warpo.kernels.preferences import Preference

_FAMILIES = {
    "policy": "policy, from sampled completions",
    "supervised": "policy, from given completions",
    "preference": "policy, from given preferences",
    "reward model": "reward models, which then reward a policy",
    "control": "gymnasium environments",
}
# The algorithms that have a file in examples/.
EXAMPLES = (
    "sft",
    "dpo",
    "bradley_terry",
    "grpo",
    "iterative_grpo",
    "dapo",
    "ppo",
    "ppo_ptx",
    "sac",
    "sac_discrete",
    "ppo_gymnasium",
    "trpo_gymnasium",
)
_COLUMNS = ("config line", "advantages or loss", "models", "paper")


def print_table(console: Console) -> None:
    """All rows, by family."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, overflow="fold")
    for family, title in _FAMILIES.items():
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in _of(family):
            table.add_row(*_cells(row))
    console.print(table, highlight=False)
    console.print(
        "warpo algorithms NAME          the numbers of a row, and how a config changes them\n"
        "warpo train --help NAME        the settings that it has",
        markup=False,
        highlight=False,
    )


def markdown() -> str:
    """The same table for docs/choosing.md."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for family, title in _FAMILIES.items():
        lines.append(f"| **{title}** |" + " |" * (len(_COLUMNS) - 1))
        for row in _of(family):
            line, what, models, _ = _cells(row)
            lines.append(f"| `{line}` | {what} | {models} | [{row.title}]({row.url}) |")
    return "\n".join(lines)


def comparison() -> str:
    """What the rows that learn from sampled completions differ in, as Markdown."""
    lines = ["| algorithm | advantages | ratio | surrogate | KL | mean |", f"|{'---|' * 6}"]
    for row in _of("policy"):
        if isinstance(row.objective, Objective):
            cells = (f"`{row.name}`", *_differences(row, row.objective))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(row: Algorithm, objective: Objective) -> tuple[str, ...]:
    surrogate = objective.surrogate
    if surrogate.startswith("divergence"):
        surrogate += f" {objective.clip_low:g}"
    elif has_effect(row)["loss.clip_range"]:
        surrogate += f" {1 - objective.clip_low:.5g} to {1 + objective.clip_high:.5g}"
    if objective.correction != "none":
        surrogate += f", {objective.correction} {objective.correction_level}"
    surrogate += {
        "none": "",
        "clip": ", not of tokens of high covariance",
        "kl": ", a KL to the old policy of tokens of high covariance",
    }[row.covariance]
    estimator = row.reward_kl_estimator if row.kl_in_reward else objective.kl_estimator
    place = "reward" if row.kl_in_reward else "loss"
    kl = f"{row.kl_coef:g} {estimator}, {place}" if row.kl_coef else "none"
    if row.previous_reference:
        kl += ", to the old policy"
    ratio = "none" if objective.surrogate == "reinforce" else objective.ratio_level
    return (row.advantage_text, ratio, surrogate, kl, objective.aggregation)


def describe(row: Algorithm) -> str:
    """One row: what it is made of, and its settings with their values."""
    lines = [f"{row.name}: {row.title}", f"  {row.url}", f"  models      {', '.join(row.models)}"]
    if row.advantages:
        lines.append(f"  advantages  {row.advantage_text}")
    if row.loss:
        lines.append(f"  loss        {row.loss}")
    if isinstance(row.objective, Objective):
        objective = row.objective
        lines.append(
            f"  loss        {objective.surrogate}, ratio of the {objective.ratio_level}, "
            f"{objective.aggregation}"
        )
    if row.caution:
        lines += textwrap.wrap(
            row.caution, 100, initial_indent="  caution     ", subsequent_indent=" " * 14
        )
    settings = _settings(row)
    if settings:
        lines += ["", "  settings, and their values where a config does not name them:"]
        lines += [f"    {name:28}{value}" for name, value in settings.items()]
    return "\n".join([*lines, "", f"  a config to begin with: {example_of(row)}"])


def example_of(row: Algorithm) -> str:
    """The config to begin with: a file of examples/, and the line to change in it."""
    if row.name in EXAMPLES:
        return f"examples/{row.name}.yaml"
    policy = "ppo" if "critic" in row.models else "grpo"
    if row.estimator.needs_sources:
        policy = "dapo"
    nearest = {"preference": "dpo", "reward model": "bradley_terry", "control": "sac"}.get(
        row.family, policy
    )
    return f"examples/{nearest}.yaml, with algorithm: {row.name}"


def _settings(row: Algorithm) -> dict[str, str]:
    """The numbers of a row under the names of their settings."""
    settings: dict[str, str] = {}
    objective = row.objective
    if isinstance(objective, Preference):
        place = "loss.kl_coef" if row.family == "policy" else "loss.beta"
        settings = {place: f"{objective.beta:g}, the beta of the loss"}
        own = {f"loss.{name}": getattr(objective, name) for name in LOSS_KEYS.get(row.name, ())}
        settings |= {name: f"{value:g}" for name, value in own.items() if name != place}
        settings["loss.nll_coef"] = f"{objective.nll_coef:g}"
    if row.family != "policy":
        return settings
    if isinstance(objective, Objective):
        correction = objective.correction
        settings |= {
            "loss.aggregation": objective.aggregation,
            "loss.clip_range": f"{objective.clip_low:.4g} {objective.clip_high:.4g}",
            "loss.kl_coef": f"{row.kl_coef:g}, of the {'reward' if row.kl_in_reward else 'loss'}",
            "loss.kl_estimator": row.reward_kl_estimator
            if row.kl_in_reward
            else objective.kl_estimator,
            "loss.kl_in": row.kl_in,
            "loss.kl_gradient": objective.kl_gradient,
            "loss.kl_level": objective.kl_level,
            "loss.sequence_mask": "none"
            if objective.sequence_mask == math.inf
            else f"{objective.sequence_mask:g}",
            "loss.kl_target": "fixed" if row.kl_target is None else f"{row.kl_target:g}",
            "loss.entropy_coef": f"{objective.entropy_coef:g}",
            "loss.correction": correction
            if correction == "none"
            else f"{correction}_{objective.correction_level}",
            "loss.correction_range": f"{objective.correction_low:g} {objective.correction_high:g}",
        }
    settings |= {
        "loss.reference_every_steps": str(row.reference_every_steps),
        "loss.baseline": row.baseline,
        "loss.baseline_decay": f"{row.baseline_decay:g}",
        "loss.reward_to_go": str(row.reward_to_go).lower(),
        "loss.whiten": str(row.whiten).lower(),
        "loss.reward_entropy_coef": f"{row.reward_entropy_coef:g}",
        "loss.reward_entropy_target": "none",
        "loss.gamma": f"{row.gamma:g}",
        "loss.gae_lambda": " ".join(map(str, row.gae_lambda)),
        "loss.advantage_std": row.advantage_std,
        "loss.pass_at_k": str(row.pass_at_k),
        "loss.pairs": row.pairs,
        "rollout.max_draws": str(row.max_draws),
        "loss.right_nll_coef": f"{row.right_nll_coef:g}",
        "loss.covariance_share": f"{row.covariance_share:g}",
        "loss.covariance_range": "{:g} {:g}".format(*row.covariance_range),
        "loss.covariance_kl_coef": f"{row.covariance_kl_coef:g}",
        "pretraining.coef": f"{row.pretraining_coef:g}",
    }
    read = has_effect(row)
    return {name: value for name, value in settings.items() if read.get(name, True)}


def _of(family: str) -> list[Algorithm]:
    return [row for row in ALGORITHMS.values() if row.family == family]


def _cells(row: Algorithm) -> tuple[str, str, str, str]:
    what = row.loss or row.advantage_text
    return f"algorithm: {row.name}", what, ", ".join(row.models), f"{row.title} {row.url}"
