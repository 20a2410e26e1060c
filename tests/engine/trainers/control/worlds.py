"""Small environments whose every number is known, under the ids of `register`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.spaces import Sequence as Varying


class Walk(gymnasium.Env):
    """Observation (steps taken, seeded start); reward is the observation's sum plus the action's.
    Ends after three steps where the start is below 0.5, else goes on until it is cut.
    """

    def __init__(self, space: str = "discrete", fixed: bool = True) -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = {
            "discrete": Discrete(3, start=1),
            "continuous": Box(np.float32([-1.0, 0.0]), np.float32([3.0, 0.5])),
            "unbounded": Box(-np.inf, np.inf, (2,), np.float32),
            "several": MultiDiscrete([2, 2]),
        }[space]
        self._fixed = fixed

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        random = self.np_random if self._fixed else np.random.default_rng()
        self._taken, self._start = 0, random.random()
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self._taken += 1
        observation = self._observation()
        reward = float(observation.sum() + np.sum(action))
        return observation, reward, self._start < 0.5 and self._taken == 3, False, {}

    def _observation(self) -> np.ndarray:
        return np.float32([self._taken, self._start])


class Unbounded(Walk):
    """Its observations have no fixed number of components."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Varying(Discrete(3))


class Grid(Walk):
    """Its observation is a number from 0 to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Discrete(4)

    def _observation(self) -> Any:
        return np.int64(self._taken % 4)


def register() -> None:
    for name, entry, options in (
        ("Walk-v0", Walk, {}),
        ("WalkContinuous-v0", Walk, {"space": "continuous"}),
        ("WalkUnbounded-v0", Walk, {"space": "unbounded"}),
        ("WalkSeveral-v0", Walk, {"space": "several"}),
        ("WalkRandom-v0", Walk, {"fixed": False}),
        ("Varying-v0", Unbounded, {}),
        ("Grid-v0", Grid, {}),
        ("Broken-v0", "no_such_package:World", {}),
    ):
        if f"warpo-tests/{name}" not in gymnasium.registry:
            gymnasium.register(
                f"warpo-tests/{name}", entry_point=entry, kwargs=options, max_episode_steps=5
            )
