"""The public face of the kernels: every operation, checked, dispatched to the backend of its
device.

from warpo.kernels import ops

logp = ops.logprobs(logits, targets)
groups = ops.group_advantages(rewards, group_size=8)
loss, metrics = ops.policy_loss(logp, old_logprobs, groups.advantages, "grpo", mask=mask,
ref_logprobs=ref) advantages, returns = ops.gae(rewards, values, gamma=1.0, gae_lambda=0.95,
mask=mask)
"""

from warpo.kernels.gae import Gae, gae
from warpo.kernels.group_advantages import GroupAdvantages, group_advantages
from warpo.kernels.kept_set_logprobs import kept_set_logprobs
from warpo.kernels.linear_logprobs import linear_logprobs, linear_logprobs_and_entropy
from warpo.kernels.logprobs import LogprobsAndEntropy, logprobs, logprobs_and_entropy
from warpo.kernels.objectives import OBJECTIVES, Objective, get_objective
from warpo.kernels.policy_loss import PolicyLoss, policy_loss
from warpo.kernels.policy_loss_from_hidden import PolicyLossFromHidden, policy_loss_from_hidden
from warpo.kernels.policy_loss_from_logits import PolicyLossFromLogits, policy_loss_from_logits
from warpo.kernels.policy_metrics import METRICS, policy_metrics, sum_metrics

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "Gae",
    "GroupAdvantages",
    "LogprobsAndEntropy",
    "Objective",
    "PolicyLoss",
    "PolicyLossFromHidden",
    "PolicyLossFromLogits",
    "gae",
    "get_objective",
    "group_advantages",
    "kept_set_logprobs",
    "linear_logprobs",
    "linear_logprobs_and_entropy",
    "logprobs",
    "logprobs_and_entropy",
    "policy_loss",
    "policy_loss_from_hidden",
    "policy_loss_from_logits",
    "policy_metrics",
    "sum_metrics",
]
