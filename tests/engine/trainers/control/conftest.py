from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.trainers.control import worlds
from warpo.engine.config.control import ControlConfig

worlds.register()


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ControlConfig]:
    """A short run in one of the small environments."""

    def make(algorithm: str = "ppo_gymnasium", **changes: Any) -> ControlConfig:
        discrete = algorithm == "ppo_gymnasium"
        small: dict[str, Any] = {
            "algorithm": algorithm,
            "output_dir": str(tmp_path / "run"),
            "steps": 48,
            "num_envs": 2,
            "environment": f"warpo-tests/Walk{'' if discrete else 'Continuous'}-v0",
        }
        if discrete:
            small["ppo"] = {"rollout_steps": 8, "minibatch_size": 8, "epochs": 2, "hidden_size": 8}
        else:
            small["sac"] = {
                "learning_starts": 8,
                "batch_size": 8,
                "hidden_size": 8,
                "steps_per_row": 16,
                "buffer_size": 40,
            }
        for name, value in changes.items():
            small[name] = small.get(name, {}) | value if isinstance(value, dict) else value
        return ControlConfig(**small)

    return make
