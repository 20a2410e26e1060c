"""Every landed result says where, when and how it was measured."""

import datetime
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "bench/results"
FILES = sorted(
    path
    for path in RESULTS.rglob("*.jsonl")
    if path.parent.name != "latest" and not path.name.startswith("metrics")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_row_has_machine_versions_date_commit_and_command(path):
    lines = path.read_text().splitlines()
    assert lines
    for number, line in enumerate(lines, 1):
        check(json.loads(line), f"{path}:{number}")


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("metrics*.jsonl")), ids=lambda p: p.stem)
def test_a_run_of_training_has_them_beside_it(path):
    check(json.loads((path.parent / "run.json").read_text()), str(path.parent / "run.json"))


def check(row, where):
    for name in ("machine", "commit", "command"):
        assert row.get(name) and row[name] != "unknown", f"{where} has no {name}"
    assert row.get("torch"), f"{where} has no versions"
    assert datetime.date.fromisoformat(row.get("date", "")[:10]), f"{where} has no date"
