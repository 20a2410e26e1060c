"""The learning rate over a run, and the optimizer that follows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import get_scheduler

from warpo.engine.learner.optimizer import AdamW
from warpo.engine.ranks import ONE_RANK, Ranks

# The names of transformers.
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up of the learning rate over some optimizer steps, and what follows.

    Args:
        name: "constant", or "linear" or "cosine" to fall to 0 after `num_steps` optimizer steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str = "constant",
        *,
        warmup_steps: int = 0,
        num_steps: int = 0,
    ) -> None:
        # that of transformers begins at 0, where a step of an optimizer moves nothing: leave it out
        (factor,) = get_scheduler(
            _SCHEDULES[name],
            torch.optim.SGD([torch.zeros(())]),
            num_warmup_steps=warmup_steps + 1,
            num_training_steps=num_steps + 1,
        ).lr_lambdas
        super().__init__(optimizer, lambda step: factor(step + 1))

    def skip(self, steps: int) -> None:
        """Go on as if so many optimizer steps had been taken."""
        self.last_epoch += steps
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [lr * factor for lr, factor in zip(self.base_lrs, factors, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step where `state_dict` was taken, with the learning rate of this run."""
        own = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = own
        self.skip(0)


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
    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]: ...


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    update: UpdateSettings,
    num_steps: int,
    *,
    lr: float | None = None,
    setting: str = "update.lr",
    ranks: Ranks = ONE_RANK,
) -> tuple[AdamW, Schedule]:
    """AdamW and its schedule from a config's `update`.

    Args:
        num_steps: optimizer steps of the run.
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
    warmup = update.warmup_steps
    return optimizer, Schedule(optimizer, update.schedule, warmup_steps=warmup, num_steps=num_steps)
