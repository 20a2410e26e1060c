"""A plugin of pytest: a row for each test that did not pass, as it ends, and the number of those
that did, once a second, in rows.jsonl of the folder that WARPO_GPU_OUT names.
"""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from warpo.bench.gpu.results import record

TEXT = 4000
_counts: Counter[str] = Counter()
_written = [0.0]


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the reports of workers reach their controller, too
        return
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.outcome == "failed":
        _record(test=report.nodeid, outcome="failed", problem=report.longreprtext[-TEXT:])
    if time.monotonic() - _written[0] > 1:
        _write_counts()


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _write_counts()


def _write_counts() -> None:
    _written[0] = time.monotonic()
    _record(counts=dict(_counts))


def _record(**fields: Any) -> None:
    step = os.environ.get("WARPO_GPU_STEP", "tests")
    record(Path(os.environ["WARPO_GPU_OUT"]), "test", step=step, **fields)
