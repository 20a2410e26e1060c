"""The learning rate over the optimizer steps."""

from typing import Any

import torch


class WarmupSchedule(torch.optim.lr_scheduler.LambdaLR):
    """The learning rate rises linearly over so many optimizer steps. Then it stays, or falls
    linearly, to be 0 after `zero_after` steps where that is not 0.
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
