"""The steps that an off-policy algorithm learns from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from warpo.engine.errors import CheckpointError


class Steps(NamedTuple):
    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    rewards: Tensor
    terminated: Tensor


class ReplayBuffer:
    """The newest `size` steps, one row each, so that a draw is one gather. Memory that no step has
    reached yet is not touched.
    """

    def __init__(self, size: int, observation: int, action: int, device: torch.device) -> None:
        self._widths = (observation, action, observation, 1, 1)
        self._rows = torch.empty(size, sum(self._widths), device=device)
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, len(self._rows))

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        next_observations: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
    ) -> None:
        """N steps, (N, ...) each; the oldest give way."""
        rows = np.concatenate(
            [observations, actions, next_observations, rewards[:, None], terminated[:, None]],
            1,
            dtype=np.float32,
        )
        size, start = len(self._rows), self._count % len(self._rows)
        first = min(len(rows), size - start)
        new = torch.from_numpy(rows)
        self._rows[start : start + first] = new[:first]
        self._rows[: len(rows) - first] = new[first:]
        self._count += len(rows)

    def draw(self, count: int) -> Steps:
        """`count` steps, uniformly and with replacement."""
        chosen = torch.randint(len(self), (count,), device=self._rows.device)
        rows = self._rows.index_select(0, chosen)
        observations, actions, after, rewards, terminated = rows.split(self._widths, 1)
        return Steps(observations, actions, after, rewards[:, 0], terminated[:, 0].bool())

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "rows": self._rows[: len(self)].cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows, count = state["rows"], state["count"]
        if min(count, len(self._rows)) != len(rows) or rows.shape[1] != self._rows.shape[1]:
            raise CheckpointError(
                f"the replay buffer kept {len(rows)} steps of {rows.shape[1]} numbers and has "
                f"place for {len(self._rows)} of {self._rows.shape[1]}: set sac.buffer_size and "
                "environment as they were"
            )
        self._rows[: len(rows)] = rows
        self._count = count
