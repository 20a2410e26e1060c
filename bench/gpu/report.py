"""The results of a run as short tables: what passed, and rows beside goals."""

from collections.abc import Sequence
from pathlib import Path

from warpo.bench.environment import aligned
from warpo.bench.gpu import results
from warpo.bench.gpu.goals import GOALS, Goal
from warpo.bench.report.rows import Row, is_ours, size, timed

SHOWN = 15  # of what failed
COLUMNS = ("cuda", "triton", "cpu", "eager", "compile")
COUNTERS = (
    *("us", "read_bytes", "written_bytes", "l2_hit_percent", "occupancy_percent"),
    *("dram_percent", "registers"),
)


def text(out: Path) -> str:
    """All tables; of each only what there is."""
    rows = list(results.read(out / results.ROWS))
    bench = list(results.read(out / results.BENCH))
    parts = [steps(rows), goals(bench), variants(bench), counters(rows), training(rows)]
    parts += [failures(rows, bench)]
    return "\n\n".join(part for part in parts if part)


def steps(rows: Sequence[Row]) -> str:
    lines = [["step", "s", "outcome"]]
    counts: dict[str, str] = {}
    for row in rows:
        if row["row"] == "test" and "counts" in row:
            counts[row["step"]] = ", ".join(f"{n} {name}" for name, n in row["counts"].items())
    for row in rows:
        if row["row"] == "step":
            outcome = "; ".join(filter(None, (row["status"], counts.get(row["name"], ""))))
            lines.append([row["name"], f"{row['seconds']:.0f}", outcome])
    return aligned(lines, 3) if len(lines) > 1 else ""


def goals(bench: Sequence[Row]) -> str:
    """Times in ms; with "*" those that miss their goal."""
    found = [[row for row in timed(bench) if goal.fits(row)] for goal in GOALS]
    names = [name for name in COLUMNS if any(r["provider"] == name for r in sum(found, []))]
    head = ["operation", "size", "dtype", "mode", "goal", "limit", *names, "best other"]
    lines = [_line(goal, mine, names) for goal, mine in zip(GOALS, found, strict=True) if mine]
    return aligned([head, *lines], 4) if lines else ""


def _line(goal: Goal, found: Sequence[Row], names: Sequence[str]) -> list[str]:
    rows = {row["provider"]: row for row in found}
    others = [row for name, row in rows.items() if name not in COLUMNS and not is_ours(name)]
    best = min(others, key=lambda row: row["ms"], default=None)
    return [
        *(goal.operation, size(found[0]), found[0]["dtype"], goal.mode),
        "" if goal.ms is None else f"{goal.ms:.4g}",
        f"{found[0]['limit_ms']:.3g}",
        *(_cell(goal, rows[name]) if name in rows else "" for name in names),
        f"{best['ms']:.3g} ({best['provider']})" if best else "",
    ]


def _cell(goal: Goal, row: Row) -> str:
    ms = goal.measured(row)
    if ms is None:
        return f"{row['ms']:.3g} with host"
    missed = goal.ms is not None and row["provider"] == "cuda" and ms > goal.ms
    return f"{ms:.3g}{'*' * missed}"


def variants(bench: Sequence[Row]) -> str:
    """What is no case of the goals, or a setting of one."""
    lines = [["variant", "size", "provider", "ms", "host us", "peak GB"]]
    for row in timed(bench):
        if not any(goal.fits(row) for goal in GOALS) or row["provider"].startswith("warpo"):
            host = f"{row['host_us']:.0f}" if "host_us" in row else ""
            cells = [row["operation"], size(row), row["provider"], f"{row['ms']:.3g}", host]
            lines.append([*cells, f"{row['peak_bytes'] / 1e9:.2f}"])
    return aligned(lines, 3) if len(lines) > 1 else ""


def counters(rows: Sequence[Row]) -> str:
    lines = [["kernel", *COUNTERS]]
    for row in rows:
        if row["row"] == "ncu":
            lines.append([row["kernel"][:50], *(_number(row.get(name)) for name in COUNTERS)])
    return aligned(lines, 1) if len(lines) > 1 else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def training(rows: Sequence[Row]) -> str:
    """The first and the last evaluation of each run."""
    lines = []
    for run, name in (("sft", "eval/loss"), ("grpo", "eval/accuracy")):
        mine = [r for r in rows if r["row"] == "training" and r["run"] == run and name in r]
        if mine:
            ends = " -> ".join(f"{r[name]:.3f} (step {r['step']})" for r in (mine[0], mine[-1]))
            lines.append(f"{run} {name}: {ends}")
    return "\n".join(lines)


def failures(rows: Sequence[Row], bench: Sequence[Row]) -> str:
    """The first of each kind."""
    smoke = [
        f"{row['operation']}, {row['way']}: {row.get('problem', row.get('error'))}"
        for row in rows
        if row["row"] == "smoke" and not row["passed"]
    ]
    tests = [
        f"{row['test']}: {(row['problem'].strip().splitlines() or [''])[-1]}"
        for row in rows
        if row["row"] == "test" and "test" in row
    ]
    cases = [
        f"{row['operation']} {row['mode']}, {row['provider']}: {row['problem']}"
        for row in bench
        if "problem" in row and not row["problem"].startswith("Missing")
    ]
    lines = []
    for name, found in (("smoke", smoke), ("tests", tests), ("table", cases)):
        if found:
            lines.append(f"{len(found)} failed in {name}:")
            lines += [f"  {line[:160]}" for line in found[:SHOWN]]
    return "\n".join(lines)
