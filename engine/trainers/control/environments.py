"""Gymnasium environments of a run: their spaces as sizes, and a vector that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from warpo.engine.config.control import SECTIONS, ControlConfig
from warpo.engine.errors import CheckpointError, ConfigError, TrainingError

# Of the seeds of evaluation: apart from those of training for any number of its environments.
_EVALUATION_STREAM = 2**31


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """Sizes of observations and actions; the bounds of continuous actions, and `first`, the number
    of the first discrete action.
    """

    observation: int
    actions: Literal["discrete", "continuous"]
    action: int
    low: np.ndarray
    high: np.ndarray
    first: int = 0


class Episodes(gymnasium.Wrapper):
    """Episodes whose seeds follow from the run's, so that the running one can be played again.

    `finished` gets (return, length) of each episode that ends. State: the number of the episode and
    the actions taken in it so far.
    """

    def __init__(self, env: gymnasium.Env, seed: int, stream: int) -> None:
        super().__init__(env)
        self.finished: list[tuple[float, int]] = []
        self._seed, self._stream = seed, stream
        self._episode = -1
        self._actions: list[Any] = []
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """The next episode. `seed` and `options` are not used."""
        self._episode += 1
        self._actions, self._return = [], 0.0
        entropy = (self._seed, self._stream, self._episode)
        return self.env.reset(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        _, reward, terminated, truncated, _ = result
        self._actions.append(np.array(action))
        self._return += float(reward)
        if terminated or truncated:
            self.finished.append((self._return, len(self._actions)))
        return result

    def state(self) -> dict[str, Any]:
        """Plain numbers, which a checkpoint keeps."""
        return {"episode": self._episode, "actions": [a.tolist() for a in self._actions]}

    def play_again(self, state: dict[str, Any]) -> Any:
        """Bring the environment to a `state()`; its observation."""
        self._episode = state["episode"] - 1
        observation, _ = self.reset()
        space = self.action_space
        for action in state["actions"]:
            observation = self.step(np.asarray(action, dtype=space.dtype))[0]
        return observation


class Environments:
    """`num_envs` environments that are stepped together and begin anew in the step that ends an
    episode.

    Attributes:
        observations: (N, D) float32 of the state that each is in.
    """

    def __init__(self, config: ControlConfig) -> None:
        self._id, self._lr = config.environment, config.lr
        self._episodes: list[Episodes] = []
        for stream in range(config.num_envs):
            self._episodes.append(Episodes(make(config.environment), config.seed, stream))
        self._vector = SyncVectorEnv(
            [lambda env=env: env for env in self._episodes],  # type: ignore[misc]
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        self.observations = self._vector.reset()[0].astype(np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step of each environment.

        Returns:
            rewards (N,) float32; terminated, truncated (N,) bool; next observations (N, D) float32,
            those of a finished episode its last, while `observations` has the first of the next.

        Raises:
            TrainingError: an action is not finite.
        """
        if not np.isfinite(actions).all():
            raise TrainingError(
                f"the actions for {self._id!r} are not finite: lower lr = {self._lr:g}, or resume "
                "from an earlier checkpoint"
            )
        observations, rewards, terminated, truncated, info = self._vector.step(actions)
        self.observations = last = observations.astype(np.float32)
        if "final_obs" in info:
            last = last.copy()
            for index in np.flatnonzero(terminated | truncated):
                last[index] = info["final_obs"][index]
        return rewards.astype(np.float32), terminated, truncated & ~terminated, last

    def take_finished(self) -> list[tuple[float, int]]:
        """(return, length) of the episodes that ended since the last call."""
        finished = [episode for env in self._episodes for episode in env.finished]
        for env in self._episodes:
            env.finished.clear()
        return finished

    def state_dict(self) -> dict[str, Any]:
        return {
            "environment": self._id,
            "episodes": [env.state() for env in self._episodes],
            "observations": self.observations.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = (state["environment"], len(state["episodes"]))
        if saved != (self._id, len(self._episodes)):
            raise CheckpointError(
                f"the run began with environment = {saved[0]!r}, num_envs = {saved[1]}, and goes "
                f"on with {self._id!r}, {len(self._episodes)}: set them as they were"
            )
        played = [
            env.play_again(episode)
            for env, episode in zip(self._episodes, state["episodes"], strict=True)
        ]
        self.observations = np.stack(played).astype(np.float32)
        if self.observations.tolist() != state["observations"]:
            raise CheckpointError(
                f"environment {self._id!r} does not come to the same state by the same seed and "
                "actions, so the run cannot be resumed: start anew"
            )
        self.take_finished()

    def close(self) -> None:
        self._vector.close()


def make(name: str) -> gymnasium.Env:
    """The environment with observations as one vector, whatever their space.

    Raises:
        ConfigError: it needs a missing package, or its observations are not a vector of numbers.
    """
    try:
        env = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"environment = {name!r} cannot be made: {error}") from None
    space = env.observation_space
    if isinstance(space, Box) and len(space.shape) == 1:
        return env
    if not space.is_np_flattenable:
        raise ConfigError(
            f"environment = {name!r} observes {space}, which has no fixed number of components"
        )
    return gymnasium.wrappers.FlattenObservation(env)


_ACTIONS = {
    "sac": ("continuous",),
    "sac_v": ("continuous",),
    "sac_discrete": ("discrete",),
    "ppo_gymnasium": ("discrete", "continuous"),
    "trpo_gymnasium": ("discrete", "continuous"),
}


def _advice(action: Any) -> str:
    """The algorithms that act in such a space, for the end of a message."""
    kind = "discrete" if isinstance(action, Discrete) else "continuous"
    if kind == "continuous" and not (isinstance(action, Box) and len(action.shape) == 1):
        return ""
    *names, last = [name for name, kinds in _ACTIONS.items() if kind in kinds]
    return f"; set algorithm to {', '.join(names)} or {last}"


def _check_target_entropy(config: ControlConfig, actions: int) -> None:
    target, most = config.sac.target_entropy, math.log(actions)
    if config.algorithm == "sac_discrete" and target != "auto" and not 0 <= target < most:
        raise ConfigError(
            f"sac.target_entropy = {target:g}: the entropy of {actions} actions is from 0 to "
            f"log({actions}) = {most:.3g} nats: set it below that"
        )


def spaces_of(config: ControlConfig) -> Spaces:
    """Return what the networks of the algorithm need to know of the environment.

    Raises:
        ConfigError: the algorithm has no policy for its actions; or as `make`.
    """
    env = make(config.environment)
    observation, action = env.observation_space, env.action_space
    env.close()
    assert observation.shape is not None
    size, nothing = int(observation.shape[0]), np.zeros(0, np.float32)
    kinds = _ACTIONS[config.algorithm]
    if isinstance(action, Discrete) and "discrete" in kinds:
        _check_target_entropy(config, int(action.n))
        return Spaces(
            observation=size,
            actions="discrete",
            action=int(action.n),
            low=nothing,
            high=nothing,
            first=int(action.start),
        )
    if "continuous" not in kinds or not isinstance(action, Box) or len(action.shape) != 1:
        raise ConfigError(
            f"algorithm = {config.algorithm!r} needs {' or '.join(kinds)} actions, "
            f"{'one number' if kinds == ('discrete',) else 'one vector'}; "
            f"environment = {config.environment!r} has {action}{_advice(action)}"
        )
    if SECTIONS[config.algorithm] == "sac" and not action.is_bounded():
        raise ConfigError(
            f"algorithm = {config.algorithm!r} needs bounded actions; environment = "
            f"{config.environment!r} has {action}; set algorithm to ppo_gymnasium or trpo_gymnasium"
        )
    low, high = action.low.astype(np.float32), action.high.astype(np.float32)
    return Spaces(
        observation=size, actions="continuous", action=int(action.shape[0]), low=low, high=high
    )


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], environment: str, *, episodes: int, seed: int
) -> list[float]:
    """Returns of the first `episodes` episodes of a seed, the same at every call.

    Args:
        act: the action for an observation of `make(environment)`.
    """
    env = Episodes(make(environment), seed, _EVALUATION_STREAM)
    for _ in range(episodes):
        observation, _ = env.reset()
        done = False
        while not done:
            observation, _, terminated, truncated, _ = env.step(act(observation))
            done = terminated or truncated
    env.close()
    return [episode_return for episode_return, _ in env.finished]
