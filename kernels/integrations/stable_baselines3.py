"""warpo's kernels inside Stable-Baselines3:

from warpo.kernels.integrations import stable_baselines3

stable_baselines3.patch()

The rollout buffer of PPO and A2C, and buffers that inherit from it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from warpo.kernels.integrations import arrays
from warpo.kernels.integrations.patching import Library

library = Library("stable_baselines3", tested=("2.9.2",))
patch, unpatch, patched, names = library.patch, library.unpatch, library.patched, library.names


@library.replaces(
    "stable_baselines3.common.buffers", "RolloutBuffer.compute_returns_and_advantage", "gae"
)
def compute_returns_and_advantage(
    original: Callable, self: Any, last_values: Tensor, dones: np.ndarray
) -> None:
    """Differs: a value behind the end of an episode is not read, so that NaN does not spread."""
    shape = (self.buffer_size, self.n_envs)
    per_step = (self.rewards, self.values, self.episode_starts)
    if (
        not all(x.dtype == np.float32 and x.shape == shape for x in per_step)
        or last_values.numel() != self.n_envs
        or dones.shape != shape[1:]
        or not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1)
    ):
        return original(self, last_values, dones)
    self.advantages, self.returns = arrays.gae(
        *per_step, last_values, dones, self.gamma, self.gae_lambda
    )
    return None
