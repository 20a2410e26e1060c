"""The learning rate over a run, and the optimizer that follows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import nn

from warpo.engine.learner.optimizer import AdamW
from warpo.engine.ranks import ONE_RANK, Ranks


class WarmupSchedule(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up of the learning rate over N optimizer steps. Then it stays, or falls linearly
    to reach 0 after `zero_after` steps if that is not 0.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, warmup_steps: int, zero_after: int = 0
    ) -> None:
        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / (warmup_steps + 1))
            if not zero_after:
                return rising
            return max(0.0, min(rising, (zero_after - step) / (zero_after - warmup_steps)))

        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step where `state_dict` was taken, with the learning rate of this run."""
        own = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = own
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class UpdateSettings(Protocol):
    """The section `update` of a config, as far as an optimizer reads it."""

    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def optimizer_state(self) -> Literal["device", "host"]: ...
    @property
    def warmup_steps(self) -> int: ...


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    update: UpdateSettings,
    *,
    lr: float | None = None,
    setting: str = "update.lr",
    zero_after: int = 0,
    ranks: Ranks = ONE_RANK,
) -> tuple[AdamW, WarmupSchedule]:
    """AdamW and its schedule from a config's `update`.

    Args:
        lr, setting: instead of its own learning rate, and the name of that.
    """
    optimizer = AdamW(
        named_parameters,
        lr=update.lr if lr is None else lr,
        betas=update.betas,
        weight_decay=update.weight_decay,
        state=update.optimizer_state,
        ranks=ranks,
        setting=setting,
    )
    return optimizer, WarmupSchedule(optimizer, update.warmup_steps, zero_after)
