"""Rows of the steps, what warpo is held to, and both as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from warpo.bench.environment import aligned
from warpo.bench.train.job import Job

Row = dict[str, Any]
PHASES = (
    "sample",
    "reward",
    "score",
    "forward",
    "backward",
    "optimizer",
    "publish",
    "verify",
    "probe",
    "other",
)
# Of the same model and tokens: a step may take TIME_GOALS of the time of TRL's, its peak is to be
# lower by WEIGHTS_GOAL copies of the weights, and the proof that the sampler has the learner's
# weights may take PROOF_GOAL of the step.
TIME_GOALS = {"trl": 0.42, "trl tuned": 0.5}
WEIGHTS_GOAL, PROOF_GOAL = 1.0, 0.02


def job_row(job: Job, name: str) -> Row:
    """Fields of a row that describe its job, whether it ran or not."""
    return {
        "trainer": name,
        "model": job.model,
        "sampler": job.sampler,
        "completions": job.completions,
        "group_size": job.group_size,
        "prompt_tokens": job.prompt_tokens,
        "new_tokens": job.new_tokens,
    }


def row_of(job: Job, name: str, answer: Row, weight_bytes: int) -> Row:
    """A row of the results: medians over the steps, in seconds.

    tokens_per_s counts prompts and completions; peak_bytes is the resident memory's.
    """
    steps = answer["steps"]
    times = sorted(step["step"] for step in steps)
    seconds = statistics.median(times)
    peak = statistics.median(answer["peaks"])
    return job_row(job, name) | {
        "weight_bytes": weight_bytes,
        "completion_tokens": answer["completion_tokens"],
        "steps": len(steps),
        "step_s": seconds,
        "step_p20_s": times[len(times) // 5],
        "step_p80_s": times[len(times) * 4 // 5],
        "step_cpu_s": statistics.median(step["cpu"] for step in steps),
        "tokens_per_s": job.completions * job.max_model_len / seconds,
        "phases_s": {
            phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in PHASES
        },
        "resident_above_imports_bytes": answer["resident_bytes"] - answer["imports_bytes"],
        "peak_bytes": peak,
        "peak_above_imports_bytes": peak - answer["imports_bytes"],
        "reward": answer["reward"],
        "versions": answer["versions"],
    }


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "step_s" in row]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one job together."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        key = (row["model"], row["sampler"], row["prompt_tokens"])
        found.setdefault(key, []).append(row)
    return list(found.values())


def goals_of(rows: Sequence[Row]) -> list[Row]:
    """Goals of warpo in one job, by itself and against each run of TRL, and the figures reached.

    Time by the clock and of the processor: the latter leaves out what neighbours take.
    """
    by_name = {row["trainer"]: row for row in timed(rows)}
    mine = by_name.pop("warpo", None)
    if mine is None:
        return []
    proof = (_phase(mine, "verify") + _phase(mine, "probe")) / mine["step_s"]
    goals = [_goal(mine, "-", "share of the step's time for the proof", "<=", PROOF_GOAL, proof)]
    for other in by_name.values():
        goals += _goals(mine, other)
    return goals


def _goals(mine: Row, other: Row) -> list[Row]:
    name, peak = other["trainer"], "peak_above_imports_bytes"
    copies = (other[peak] - mine[peak]) / mine["weight_bytes"]
    limit = TIME_GOALS[name]
    return [
        *(
            _goal(mine, name, f"share of the step's {what}", "<=", limit, mine[key] / other[key])
            for what, key in (("time", "step_s"), ("CPU time", "step_cpu_s"))
        ),
        _goal(mine, name, "copies of the weights less at the peak", ">=", WEIGHTS_GOAL, copies),
    ]


def _goal(mine: Row, against: str, figure: str, relation: str, limit: float, reached: float) -> Row:
    return {
        **{key: mine[key] for key in ("model", "sampler", "prompt_tokens")},
        "against": against,
        "figure": figure,
        "goal": f"{relation} {limit}",
        "reached": reached,
        "met": reached <= limit if relation == "<=" else reached >= limit,
    }


def _phase(row: Row, phase: str) -> float:
    """Seconds of a phase; 0 in rows that were landed before it was told apart."""
    return float(row["phases_s"].get(phase, 0.0))


def table_of(rows: Sequence[Row]) -> str:
    """A column for each trainer of one job, times in milliseconds; below, what has no time."""
    ran = timed(rows)
    problems = [f"{row['trainer']}: {row['problem']}" for row in rows if "problem" in row]
    return "\n".join([*([_columns(ran)] if ran else []), *problems])


def _columns(rows: Sequence[Row]) -> str:
    ms, mib = 1e3, 2**-20
    first = rows[0]
    title = f"{first['model']}, prompts of {first['prompt_tokens']} by {first['sampler']}, median"
    lines = [[title, *(row["trainer"] for row in rows)]]
    for phase in PHASES:
        lines.append([f"{phase} ms", *(f"{ms * _phase(row, phase):.1f}" for row in rows)])
    lines.append(["step ms", *(f"{ms * row['step_s']:.0f}" for row in rows)])
    lines.append(
        [
            "  p20 to p80",
            *(f"{ms * row['step_p20_s']:.0f} to {ms * row['step_p80_s']:.0f}" for row in rows),
        ]
    )
    lines.append(["  CPU ms", *(f"{ms * row['step_cpu_s']:.0f}" for row in rows)])
    lines.append(["tokens/s", *(f"{row['tokens_per_s']:.0f}" for row in rows)])
    held = (f"{mib * row['resident_above_imports_bytes']:.0f}" for row in rows)
    lines.append(["MiB above imports before the first update", *held])
    lines.append(["peak MiB", *(f"{mib * row['peak_bytes']:.0f}" for row in rows)])
    above = (f"{mib * row['peak_above_imports_bytes']:.0f}" for row in rows)
    lines.append(["  above imports", *above])
    lines.append(["weights MiB", *(f"{mib * row['weight_bytes']:.1f}" for row in rows)])
    lines.append(["timed steps", *(str(row["steps"]) for row in rows)])
    return aligned(lines, 1)


def goals_table(goals: Sequence[Row]) -> str:
    lines = [["model", "prompts", "sampler", "figure", "against", "goal", "reached", ""]]
    for goal in goals:
        lines.append(
            [
                goal["model"],
                str(goal["prompt_tokens"]),
                goal["sampler"],
                goal["figure"],
                goal["against"],
                goal["goal"],
                f"{goal['reached']:.2f}",
                "met" if goal["met"] else "missed",
            ]
        )
    return aligned(lines, 5)
