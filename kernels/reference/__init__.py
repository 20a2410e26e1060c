"""Every operation in plain PyTorch: the definition that all backends are tested against.

Any floating dtype up to float64, differentiable by autograd, no speed intended. Arguments mean what
they mean in `ops`; they are checked there. Masked slots are replaced before any arithmetic, so that
NaN in them reaches neither results nor gradients.
"""

from warpo.kernels.reference.adamw_publish import adamw_publish
from warpo.kernels.reference.aggregate import aggregate
from warpo.kernels.reference.approx_kl import approx_kl
from warpo.kernels.reference.fingerprint import fingerprint
from warpo.kernels.reference.gae import discounted_returns, gae, lambda_returns
from warpo.kernels.reference.group_advantages import group_advantages
from warpo.kernels.reference.kept_set_logprobs import kept_set_logprobs
from warpo.kernels.reference.linear_logprobs import linear_logprobs
from warpo.kernels.reference.logprobs import logprobs
from warpo.kernels.reference.off_policy_returns import off_policy_returns
from warpo.kernels.reference.policy_loss import kl_estimate, policy_loss
from warpo.kernels.reference.preference_loss import kto_loss, preference_loss
from warpo.kernels.reference.process_advantages import process_advantages
from warpo.kernels.reference.reward_model_loss import ranking_loss, reward_model_loss
from warpo.kernels.reference.shaped_gae import shaped_gae
from warpo.kernels.reference.soft_q_targets import soft_q_targets
from warpo.kernels.reference.squashed_gaussian import squashed_gaussian
from warpo.kernels.reference.value_loss import value_loss
from warpo.kernels.reference.vtrace import vtrace
from warpo.kernels.reference.whiten import whiten

__all__ = [
    "adamw_publish",
    "aggregate",
    "approx_kl",
    "discounted_returns",
    "fingerprint",
    "gae",
    "group_advantages",
    "kept_set_logprobs",
    "kl_estimate",
    "kto_loss",
    "lambda_returns",
    "linear_logprobs",
    "logprobs",
    "off_policy_returns",
    "policy_loss",
    "preference_loss",
    "process_advantages",
    "ranking_loss",
    "reward_model_loss",
    "shaped_gae",
    "soft_q_targets",
    "squashed_gaussian",
    "value_loss",
    "vtrace",
    "whiten",
]
