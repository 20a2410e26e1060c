"""The public face of the kernels: every operation, checked, dispatched to the backend of its
device.

    from warpo.kernels import ops

    logp = ops.logprobs(logits, targets)
    groups = ops.group_advantages(rewards, group_size=8)
    loss, metrics = ops.policy_loss(
        logp, old_logprobs, groups.advantages, "grpo", mask=mask, ref_logprobs=ref_logprobs
    )
    advantages, returns = ops.gae(rewards, values, gamma=1.0, gae_lambda=0.95, mask=mask)
"""

from warpo.kernels._adamw_publish import AdamwPublish, adamw_publish, adamw_publish_foreach
from warpo.kernels._aggregate import aggregate
from warpo.kernels._approx_kl import approx_kl
from warpo.kernels._fingerprint import fingerprint, fingerprint_foreach
from warpo.kernels._gae import Gae, gae
from warpo.kernels._group_advantages import GroupAdvantages, group_advantages
from warpo.kernels._kept_set_logprobs import kept_set_logprobs
from warpo.kernels._kto_loss import (
    KTO_METRICS,
    KtoLoss,
    kto_loss,
    kto_metrics,
    kto_reference_point,
)
from warpo.kernels._linear_logprobs import linear_logprobs, linear_logprobs_and_entropy
from warpo.kernels._logprobs import LogprobsAndEntropy, logprobs, logprobs_and_entropy
from warpo.kernels._off_policy_returns import off_policy_returns
from warpo.kernels._policy_loss import PolicyLoss, policy_loss
from warpo.kernels._policy_loss_from_hidden import PolicyLossFromHidden, policy_loss_from_hidden
from warpo.kernels._policy_loss_from_logits import PolicyLossFromLogits, policy_loss_from_logits
from warpo.kernels._policy_metrics import METRICS, policy_metrics, sum_metrics
from warpo.kernels._preference_loss import (
    PREFERENCE_METRICS,
    PreferenceLoss,
    preference_loss,
    preference_metrics,
)
from warpo.kernels._process_advantages import ProcessAdvantages, process_advantages
from warpo.kernels._returns import discounted_returns, lambda_returns
from warpo.kernels._reward_model_loss import (
    REWARD_METRICS,
    RewardModelLoss,
    merge_reward_model_metrics,
    ranking_loss,
    reward_model_loss,
    reward_model_metrics,
)
from warpo.kernels._shaped_gae import ShapedGae, shaped_gae
from warpo.kernels._soft_q_targets import soft_q_targets
from warpo.kernels._squashed_gaussian import SquashedGaussian, squashed_gaussian
from warpo.kernels._value_loss import (
    VALUE_METRICS,
    ValueLoss,
    merge_value_metrics,
    value_loss,
    value_metrics,
)
from warpo.kernels._vtrace import Vtrace, vtrace
from warpo.kernels._whiten import whiten
from warpo.kernels.objectives import OBJECTIVES, Objective, get_objective
from warpo.kernels.preferences import PREFERENCES, Preference, get_preference

__all__ = [
    "KTO_METRICS",
    "METRICS",
    "OBJECTIVES",
    "PREFERENCES",
    "PREFERENCE_METRICS",
    "REWARD_METRICS",
    "VALUE_METRICS",
    "AdamwPublish",
    "Gae",
    "GroupAdvantages",
    "KtoLoss",
    "LogprobsAndEntropy",
    "Objective",
    "PolicyLoss",
    "PolicyLossFromHidden",
    "PolicyLossFromLogits",
    "Preference",
    "PreferenceLoss",
    "ProcessAdvantages",
    "RewardModelLoss",
    "ShapedGae",
    "SquashedGaussian",
    "ValueLoss",
    "Vtrace",
    "adamw_publish",
    "adamw_publish_foreach",
    "aggregate",
    "approx_kl",
    "discounted_returns",
    "fingerprint",
    "fingerprint_foreach",
    "gae",
    "get_objective",
    "get_preference",
    "group_advantages",
    "kept_set_logprobs",
    "kto_loss",
    "kto_metrics",
    "kto_reference_point",
    "lambda_returns",
    "linear_logprobs",
    "linear_logprobs_and_entropy",
    "logprobs",
    "logprobs_and_entropy",
    "merge_reward_model_metrics",
    "merge_value_metrics",
    "off_policy_returns",
    "policy_loss",
    "policy_loss_from_hidden",
    "policy_loss_from_logits",
    "policy_metrics",
    "preference_loss",
    "preference_metrics",
    "process_advantages",
    "ranking_loss",
    "reward_model_loss",
    "reward_model_metrics",
    "shaped_gae",
    "soft_q_targets",
    "squashed_gaussian",
    "sum_metrics",
    "value_loss",
    "value_metrics",
    "vtrace",
    "whiten",
]
