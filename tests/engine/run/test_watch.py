"""Warnings of a run that does not learn, and none of one that does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from warpo.engine.run.watch import STEPS, Watch

ROOT = Path(__file__).parents[3]
GOOD = {
    "reward/mean": 0.25,
    "reward/std": 0.4,
    "reward/accuracy": 0.25,
    "reward/degenerate_frac": 0.2,
    "completion/truncated_frac": 0.1,
    "completion/length_mean": 200.0,
    "entropy/mean": 1.0,
    "kl/mean": 0.01,
}


def warnings(*runs: tuple[int, dict[str, float]]) -> dict[int, list[str]]:
    """Those of a run of so many rows each, by step."""
    watch, found, step = Watch(), {}, 0
    for count, changes in runs:
        for _ in range(count):
            step += 1
            if said := watch.warnings({"step": step, **GOOD, **changes}):
                found[step] = said
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward/degenerate_frac": 1}, "each prompt got one reward (reward/mean = 0.25)"),
        ({"reward/std": 0.0}, "a step got one reward (reward/mean = 0.25)"),
        (
            {"reward/std": 0.0, "reward/mean": 1.0, "reward/accuracy": 1.0},
            "all are right, which teaches nothing more; take harder prompts",
        ),
        ({"completion/truncated_frac": 1.0}, "(completion/length_mean = 200): raise rollout.max"),
        ({"entropy/mean": 0.01}, "entropy/mean = 0.01 nats per token, 1 at the beginning"),
        ({"kl/mean": 30.0, "reward/mean": 0.1}, "kl/mean = 30 nats per token, and reward/mean = "),
        ({"kl/mean": math.nan, "reward/mean": 0.1}, "kl/mean = nan nats per token"),
    ],
)
def test_a_sign_that_holds_is_told_once_since_when(changes: dict, words: str) -> None:
    found = warnings((STEPS, {}), (3 * STEPS, changes), (STEPS, {}), (3 * STEPS, changes))
    (said,) = found.pop(2 * STEPS)
    assert said.startswith(f"warning: since step {STEPS + 1} ") and words in said
    assert "\n" not in said and not found


@pytest.mark.parametrize(
    "changes",
    [
        {"reward/degenerate_frac": 0.99},
        {"completion/truncated_frac": 0.99},
        {"entropy/mean": 0.06},
        # what a solved task looks like
        {"entropy/mean": 0.001, "reward/accuracy": 0.95, "reward/mean": 0.95},
        {"kl/mean": 4.0, "reward/mean": 0.9},
    ],
)
def test_a_run_that_learns_is_not_warned_of(changes: dict) -> None:
    assert not warnings((STEPS, {}), (3 * STEPS, changes))


def test_a_sign_that_goes_away_starts_anew() -> None:
    equal = {"reward/degenerate_frac": 1.0}
    found = warnings((STEPS - 1, equal), (1, {}), (STEPS, equal))
    assert list(found) == [2 * STEPS] and f"since step {STEPS + 1} " in found[2 * STEPS][0]


def test_entropy_that_is_low_from_the_beginning_has_not_collapsed() -> None:
    assert not warnings((5 * STEPS, {"entropy/mean": 0.01}))


def test_rows_of_an_earlier_process_count() -> None:
    watch = Watch()
    watch.take({"step": 0, "eval/accuracy": 0.0})
    for step in range(1, STEPS + 5):
        watch.take({"step": step, **GOOD, "completion/truncated_frac": 1.0})
    (said,) = watch.warnings({"step": STEPS + 5, **GOOD, "completion/truncated_frac": 1.0})
    assert "since step 1 " in said


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_is_not_warned_of(seed: int) -> None:
    path = ROOT / f"bench/results/main-job/metrics-seed-{seed}.jsonl"
    watch = Watch()
    for line in path.read_text().splitlines():
        assert not watch.warnings(json.loads(line))
