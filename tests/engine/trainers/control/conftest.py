from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.trainers.control import worlds
from warpo.engine.config.control import SECTIONS, ControlConfig
from warpo.engine.trainers.control.replay import Steps

worlds.register()


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ControlConfig]:
    """A short run in one of the small environments."""

    def make(algorithm: str = "ppo_gymnasium", **changes: Any) -> ControlConfig:
        discrete = algorithm not in ("sac", "sac_v")
        small: dict[str, Any] = {
            "algorithm": algorithm,
            "output_dir": str(tmp_path / "run"),
            "steps": 48,
            "num_envs": 2,
            "environment": f"warpo-tests/Walk{'' if discrete else 'Continuous'}-v0",
        }
        section = SECTIONS[algorithm]
        small[section] = {
            "ppo": {"rollout_steps": 8, "minibatch_size": 8, "epochs": 2, "hidden_size": 8},
            "trpo": {"rollout_steps": 8, "minibatch_size": 8, "value_epochs": 2, "hidden_size": 8},
            "sac": {
                "learning_starts": 8,
                "batch_size": 8,
                "hidden_size": 8,
                "steps_per_row": 16,
                "buffer_size": 40,
            },
        }[section]
        for name, value in changes.items():
            small[name] = small.get(name, {}) | value if isinstance(value, dict) else value
        return ControlConfig(**small)

    return make


@pytest.fixture
def steps() -> Steps:
    """Steps of continuous actions, of which the first ended its episode."""
    torch.manual_seed(1)
    return Steps(
        torch.randn(8, 2),
        torch.rand(8, 2) * 2 - 1,
        torch.randn(8, 2),
        torch.randn(8),
        torch.tensor([True] + [False] * 7),
    )
