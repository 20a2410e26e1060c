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
from warpo.kernels.integrations._array_views import is_readable
from warpo.kernels.integrations.patching import Library
from warpo.kernels.integrations.serving import require

library = Library("stable_baselines3", tested=("2.9.2",))
patch, unpatch, patched = library.patch, library.unpatch, library.patched
names, report = library.names, library.report


@library.replaces(
    "stable_baselines3.common.buffers", "RolloutBuffer.compute_returns_and_advantage", "gae"
)
def compute_returns_and_advantage(
    original: Callable, self: Any, last_values: Tensor, dones: np.ndarray
) -> None:
    """Advantages are written in place, returns are a new array, as the library does it.

    Differs: a value behind the end of an episode is not read, so that NaN does not spread."""
    shape = (self.buffer_size, self.n_envs)
    buffers = (self.rewards, self.values, self.episode_starts, self.advantages)
    for buffer in buffers:
        require(buffer.dtype == np.float32, "a buffer that is not float32")
        require(buffer.shape == shape, "a buffer of another shape")
    writable = self.advantages.flags.writeable and is_readable(self.advantages)
    require(writable, "advantages that are read-only or run backwards")
    require(last_values.numel() == self.n_envs, "last_values that are not one per environment")
    require(dones.shape == shape[1:], "dones that are not one per environment")
    require(0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1, "gamma or lambda outside [0, 1]")
    starts, dones = _flags(self.episode_starts), _flags(dones)
    last, returns = last_values.detach().float().cpu().numpy(), np.empty(shape, np.float32)
    arrays.gae_into(
        self.advantages,
        returns,
        self.rewards,
        self.values,
        dones=starts,
        next_value=last,
        next_done=dones,
        gamma=self.gamma,
        gae_lambda=self.gae_lambda,
    )
    self.returns = returns


def _flags(array: np.ndarray) -> np.ndarray:
    """As bool; the library subtracts them from 1."""
    if array.dtype == np.bool_:
        return array
    flags = array != 0
    require((flags == array).all(), "starts or dones that are neither 0 nor 1")
    return flags
