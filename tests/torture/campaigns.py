"""Campaigns of attacks, each in a process that may hang or die of it."""

from __future__ import annotations

import importlib
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Campaign:
    """Attacks of one kind: `attack(seed, folder)` of the module of that name, which gives None
    where it was survived and else a line. `short` of them are in the slow tests.
    """

    name: str
    attacks: int
    short: int
    deadline_s: int
    about: str


CAMPAIGNS = {
    campaign.name: campaign
    for campaign in (
        Campaign("settings", 2000, 200, 20, "configs with lines, values and bytes changed"),
        Campaign("data", 3200, 200, 20, "JSONL and Parquet files with bytes and values changed"),
        Campaign("rewards", 240, 8, 120, "hostile replies of servers, hostile functions"),
        Campaign("checkpoints", 176, 15, 120, "checkpoints with a file, tensor or bit changed"),
        Campaign("kills", 40, 3, 600, "runs killed at any moment and at any file operation"),
    )
}


def survive(name: str, seed: int) -> str | None:
    """One attack in this process; what went wrong, or None."""
    campaign = CAMPAIGNS[name]
    attack = importlib.import_module(f"tests.torture.{name}").attack

    def hang(signum: int, frame: object) -> None:
        raise TimeoutError(f"no end after {campaign.deadline_s} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(campaign.deadline_s)
    try:
        with tempfile.TemporaryDirectory(prefix="warpo-torture-") as folder:
            return attack(seed, Path(folder))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)


def run(name: str, seeds: Sequence[int], jobs: int, report: Callable[[], None]) -> dict[int, str]:
    """Failures by seed; `report` is called after each attack."""
    failed: dict[int, str] = {}
    unknown = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(survive, name, seed): seed for seed in seeds}
        for future in as_completed(futures):
            try:
                if problem := future.result():
                    failed[futures[future]] = problem
                report()
            except BrokenProcessPool:  # one process died, and the pool with it
                unknown.append(futures[future])
    if unknown and len(seeds) == 1:
        report()
        return {seeds[0]: "the process died"}
    for half in (unknown[: len(unknown) // 2], unknown[len(unknown) // 2 :]):
        failed |= run(name, half, jobs, report) if half else {}
    return failed
