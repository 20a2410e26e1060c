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
from warpo.kernels.logprobs import LogprobsAndEntropy, logprobs, logprobs_and_entropy
from warpo.kernels.objectives import OBJECTIVES, Objective, get_objective
from warpo.kernels.policy_loss import METRICS, PolicyLoss, policy_loss, policy_metrics, sum_metrics
from warpo.kernels.returns import discounted_returns, lambda_returns
from warpo.kernels.shaped_gae import ShapedGae, shaped_gae
from warpo.kernels.vtrace import Vtrace, vtrace
from warpo.kernels.whiten import whiten

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "Gae",
    "GroupAdvantages",
    "LogprobsAndEntropy",
    "Objective",
    "PolicyLoss",
    "ShapedGae",
    "Vtrace",
    "discounted_returns",
    "gae",
    "get_objective",
    "group_advantages",
    "lambda_returns",
    "logprobs",
    "logprobs_and_entropy",
    "policy_loss",
    "policy_metrics",
    "shaped_gae",
    "sum_metrics",
    "vtrace",
    "whiten",
]
