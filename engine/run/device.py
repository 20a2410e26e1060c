"""Device on which the learner runs, and the wait for it."""

from __future__ import annotations

from typing import Protocol

import torch

from warpo.engine.errors import ConfigError


class DeviceSetting(Protocol):
    @property
    def device(self) -> str: ...


def learner_device(config: DeviceSetting) -> torch.device:
    """Return the device of the learner, "auto" looked up."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device: set device to cpu")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def finish_device_work() -> None:
    """Wait for what a GPU has been given to do, so that a clock read next has it behind it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
