"""The cases that are timed on a GPU, and what they should take there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from warpo.bench.operation import Sizes
from warpo.bench.operations import OPERATIONS
from warpo.bench.report.rows import Row
from warpo.bench.shapes import LLAMA, QWEN
from warpo.bench.suite import Point

GPT2 = 50257  # odd: no row but the first lies on a boundary of 16 bytes

_BF16, _FP32 = torch.bfloat16, torch.float32
# Sizes for a machine without a GPU, where a run shows only that the programs work.
SMALL = {
    "tokens": 16,
    "hidden": 32,
    "vocabulary": 500,
    "sequences": 4,
    "steps": 16,
    "pairs": 4,
    "parameters": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A case, and its goal on an H200.

    Attributes:
        ms: milliseconds that it should take at most; None: its limit is all there is to compare.
        in_graph: they are those of a replay of a CUDA graph, which leaves out the host.
        compiled: torch.compile is worth waiting for.
    """

    operation: str
    sizes: Sizes
    dtype: torch.dtype = _FP32
    mode: str = "fwd"
    ms: float | None = None
    in_graph: bool = False
    compiled: bool = False

    def point(self, device: str) -> Point:
        return Point(
            operation=OPERATIONS[self.operation],
            sizes=self._sizes_on(device),
            dtype=self.dtype,
            mode=self.mode,
        )

    def _sizes_on(self, device: str) -> Sizes:
        small = {name: min(size, SMALL[name]) for name, size in self.sizes.items()}
        return self.sizes if device == "cuda" else small

    def measured(self, row: Row) -> float | None:
        """Of a row of this case, the milliseconds that the goal is about."""
        return row.get("graph_ms" if self.in_graph else "ms")

    def fits(self, row: Row) -> bool:
        """Whether the row is one of this case."""
        dtype = str(self.dtype).removeprefix("torch.")
        mine = (self.operation, self._sizes_on(row["device"]), dtype, self.mode)
        return mine == (row["operation"], row["sizes"], row["dtype"], row["mode"])


def _of_logits(vocabulary: int) -> Sizes:
    return {"tokens": 8192, "vocabulary": vocabulary}


def _head() -> Sizes:
    return {"tokens": 8192, "hidden": 4096, "vocabulary": QWEN}


def _rollouts() -> Sizes:
    return {"sequences": 8, "steps": 1024, "vocabulary": QWEN}


def _steps(sequences: int, steps: int) -> Sizes:
    return {"sequences": sequences, "steps": steps}


def _goals() -> Iterator[Goal]:
    def goal(operation: str, sizes: Sizes, **fields: Any) -> Goal:
        return Goal(operation=operation, sizes=sizes, **fields)

    both, bf16 = "logprobs_and_entropy", {"dtype": _BF16}
    yield goal(both, _of_logits(QWEN), **bf16, ms=0.65, compiled=True)
    yield goal("logprobs", _of_logits(QWEN), **bf16, mode="bwd", ms=1.28)
    loss = "policy_loss_from_logits"
    yield goal(loss, _rollouts(), **bf16, mode="fwd+bwd", ms=1.30, compiled=True)
    yield goal(loss, _rollouts(), mode="fwd+bwd")
    yield goal("policy_loss_from_hidden", _head(), **bf16, mode="fwd+bwd", ms=48.0)
    yield goal("linear_logprobs_and_entropy", _head(), **bf16, ms=16.0)
    yield goal("gae", _steps(256, 8192), ms=0.015, in_graph=True)
    yield goal("policy_loss", _steps(32, 1024), ms=0.012, in_graph=True, compiled=True)
    yield goal("policy_loss", _steps(32, 1024), mode="fwd+bwd", compiled=True)
    yield goal("adamw_publish", {"parameters": 1 << 28}, **bf16)
    yield goal("fingerprint", {"parameters": 1 << 28}, **bf16)
    yield goal("value_loss", _steps(16, 8192))
    yield goal("value_loss", _steps(16, 8192), mode="fwd+bwd")
    yield goal("preference_loss", {"pairs": 16, "steps": 4096})
    yield goal("preference_loss", {"pairs": 16, "steps": 4096}, mode="fwd+bwd")
    yield goal(both, _of_logits(QWEN), **bf16, mode="bwd")
    yield goal("linear_logprobs", _head(), **bf16, mode="fwd+bwd")
    yield goal("kept_set_logprobs", _head(), **bf16)
    for vocabulary in (LLAMA, GPT2):
        yield goal(both, _of_logits(vocabulary), **bf16)
        yield goal("logprobs", _of_logits(vocabulary), **bf16, mode="bwd")
    yield goal("gae, environments", _steps(4096, 128), ms=0.005, in_graph=True)
    yield goal("logprobs", _of_logits(QWEN), **bf16, mode="fwd+bwd", compiled=True)


GOALS = tuple(_goals())
