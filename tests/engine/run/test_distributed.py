"""Ranks over torch.distributed: two processes with gloo."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.processes import finish, on_ranks, start_ranks
from warpo.engine import cli
from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.run.distributed import open_ranks


def caught(work: Callable[[], Any]) -> str:
    """Class and message of what `work` raises."""
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def meet() -> dict[str, Any]:
    """What a rank finds out with another one."""
    with open_ranks() as ranks:
        weights = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
        weights[0].grad = torch.full((3,), 1.0 + ranks.rank)
        if ranks.rank == 1:
            weights[1].grad = torch.ones(3)
        ranks.sum_gradients(weights)

        def spoil() -> int:
            ranks.phase = "reward"
            if ranks.rank == 1:
                raise RewardError("no answer")
            return 0

        def crash() -> int:
            if ranks.rank == 0:
                raise KeyError("x")
            return 0

        found = {
            "rank": ranks.rank,
            "sum": ranks.sum(ranks.rank + 2),
            "tensor": ranks.sum(torch.tensor([1.0, ranks.rank])),
            "max": ranks.max(float(ranks.rank)),
            "any": [ranks.any(False), ranks.any(ranks.rank == 1)],
            "gather": ranks.gather([ranks.rank] * (ranks.rank + 1)),
            "spread": ranks.spread("abc", lambda mine: [x + str(ranks.rank) for x in mine]),
            "one": ranks.spread("a", lambda mine: [x + str(ranks.rank) for x in mine]),
            "main": ranks.on_main(lambda: ranks.rank),
            "grads": [p.grad for p in weights],
            "spoiled": caught(lambda: ranks.together(spoil)),
            "summed while the other fails": caught(
                lambda: ranks.sum(1) if ranks.rank else ranks.together(crash)
            ),
        }
        ranks.phase = ""
        interrupted = KeyboardInterrupt() if ranks.rank else None
        try:
            ranks.fail(interrupted) if interrupted else ranks.barrier()
        except KeyboardInterrupt as error:
            found["interrupted"] = ranks.agrees_on(error)
        return found


def test_two_processes_sum_gather_spread_and_fail_together(tmp_path: Path) -> None:
    found = on_ranks(meet, tmp_path)
    for rank, one in enumerate(found):
        assert one["rank"] == rank
        assert one["sum"] == 5 and one["max"] == 1.0 and one["any"] == [False, True]
        assert one["tensor"].tolist() == [2.0, 1.0]
        assert one["gather"] == [0, 1, 1]
        assert one["spread"] == ["a0", "b1", "c1"] and one["one"] == ["a1"]
        assert one["main"] == 0 and one["interrupted"]
        grads = [grad if grad is None else grad.tolist() for grad in one["grads"]]
        assert grads == [[3.0] * 3, [1.0] * 3, None]
        assert one["spoiled"] == "RewardError: rank 1, reward: no answer"
    # the one that crashed has its traceback
    crashes = [one["summed while the other fails"] for one in found]
    assert crashes == ["KeyError: 'x'", "RankError: rank 0, reward: KeyError: 'x'"]


def lose_one() -> None:
    """Rank 1 is killed while rank 0 waits for it."""
    with open_ranks() as ranks:
        ranks.phase = "sample"
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.barrier()


def fail_alone() -> None:
    """Rank 1 fails outside of what ranks do together."""
    with open_ranks() as ranks:
        ranks.phase = "load"
        if ranks.rank == 1:
            raise RewardError("no answer")
        ranks.barrier()


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lose_one, {0: "RankError: rank 0, sample: lost the others"}),
        (fail_alone, {0: "RewardError: rank 1, load: no answer", 1: "RewardError: no answer"}),
    ],
)
def test_a_rank_that_ends_is_missed_at_once(
    tmp_path: Path, work: Callable[[], None], told: dict[int, str]
) -> None:
    command = [sys.executable, "-c", f"from {__name__} import {work.__name__} as f; f()"]
    start = time.monotonic()
    ended = finish(start_ranks(command, tmp_path))
    assert time.monotonic() - start < 60
    for rank, (status, _, errors) in enumerate(ended):
        assert status != 0
        if rank in told:
            assert told[rank] in errors


def test_several_ranks_are_refused_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: m\noutput_dir: o\nsteps: 3\nsampler: transformers\n"
        "data: {train: t.jsonl}\nreward: {sources: 'a:b'}\n"
    )
    for command in ("train", "check"):
        assert cli.main([command, str(path)]) == 1
        assert capsys.readouterr().err.startswith("warpo: WORLD_SIZE = 2: ")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK is not set: start .* torchrun"), open_ranks():
        pass
