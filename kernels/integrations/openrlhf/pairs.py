"""OpenRLHF's losses of pairs: reward models and DPO.

There is one number per pair, so that the whole is a few vector operations, and any of them costs
less than the launch of a kernel with its workspace: these are the same formulas in fewer
operations, through log(1 + e^x) = softplus(x), which does not overflow. No kernel runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warpo.kernels.integrations.openrlhf._library import LOSSES, library
from warpo.kernels.integrations.serving import require, require_served


@library.replaces(LOSSES, "LogExpLoss.forward")
def log_exp_loss(
    original: Callable,
    self: Any,
    chosen_reward: Tensor,
    reject_reward: Tensor,
    margin: Tensor | None = None,
) -> Tensor:
    """Differs: finite where the rejected reward is more than 88 above the chosen one, and not 0
    where it is more than 17 below.
    """
    require_served(chosen_reward, reject_reward)
    return F.softplus(reject_reward - chosen_reward).mean()


@library.replaces(LOSSES, "DPOLoss.forward")
def dpo_loss(
    original: Callable,
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    require(not self.ipo, "IPO")
    require_served(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    margin = chosen - rejected
    losses = F.softplus(margin * -self.beta)
    if self.label_smoothing:
        # -log sigmoid(-x) = x - log sigmoid(x)
        losses = torch.add(losses, margin, alpha=self.beta * self.label_smoothing)
    return losses.mean(), chosen.detach() * self.beta, rejected.detach() * self.beta
