"""Stable-Baselines3's rollout buffer: the steps of its defaults, and many environments."""

from collections.abc import Callable

import numpy as np
import torch

from warpo.bench.dropin.case import DropIn

SIZES = ((128, 4), (128, 8), (2048, 1), (512, 4096))


def cases() -> list[DropIn]:
    return [
        DropIn(
            function="RolloutBuffer.compute_returns_and_advantage",
            size=f"{steps} x {envs}, float32",
            mode="forward",
            make=_make(steps, envs),
        )
        for steps, envs in SIZES
    ]


def _make(steps: int, envs: int) -> Callable[[], Callable[[Callable], object]]:
    def make() -> Callable[[Callable], object]:
        from gymnasium import spaces
        from stable_baselines3.common.buffers import RolloutBuffer

        box = spaces.Box(-1, 1, (1,))
        buffer = RolloutBuffer(steps, box, box, "cpu", gae_lambda=0.95, gamma=0.99, n_envs=envs)
        rng = np.random.default_rng(0)
        buffer.rewards[:], buffer.values[:] = rng.normal(size=(2, steps, envs))
        buffer.episode_starts[:] = rng.random((steps, envs)) < 0.01
        last_values, dones = torch.zeros(envs), np.zeros(envs, bool)
        return lambda function: function(buffer, last_values, dones)

    return make
