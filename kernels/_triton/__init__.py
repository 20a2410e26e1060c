"""The operations in Triton: a backend with the functions that `native` describes.

Every shape, stride and number is a run-time argument: a kernel is compiled once for each set of
dtypes, present optional tensors and flags, logits also by alignment. With TRITON_INTERPRET=1 set
before Python starts, the kernels run on CPU tensors, slowly, for tests; use float32 there, since
the interpreter truncates float32 where a GPU rounds to bfloat16.
"""

from warpo.kernels._triton.adamw_publish import adamw_publish
from warpo.kernels._triton.aggregate import aggregate_backward, aggregate_forward
from warpo.kernels._triton.approx_kl import approx_kl_backward, approx_kl_forward
from warpo.kernels._triton.fingerprint import fingerprint
from warpo.kernels._triton.gae import gae_backward, gae_forward
from warpo.kernels._triton.group_advantages import (
    group_advantages_backward,
    group_advantages_forward,
)
from warpo.kernels._triton.kept_set_logprobs import (
    kept_set_logprobs_backward,
    kept_set_logprobs_forward,
    kept_set_weight_gradient,
)
from warpo.kernels._triton.logprobs import logprobs_backward, logprobs_forward
from warpo.kernels._triton.n_step_advantages import n_step_advantages
from warpo.kernels._triton.policy_loss import policy_loss
from warpo.kernels._triton.policy_loss_from_logits import policy_loss_from_logits, scale_gradient
from warpo.kernels._triton.preference_loss import kto_loss, preference_loss
from warpo.kernels._triton.process_advantages import process_advantages
from warpo.kernels._triton.reward_model_loss import ranking_loss, reward_model_loss
from warpo.kernels._triton.shaped_gae import shaped_gae
from warpo.kernels._triton.soft_q_targets import soft_q_targets
from warpo.kernels._triton.squashed_gaussian import (
    squashed_gaussian_backward,
    squashed_gaussian_forward,
)
from warpo.kernels._triton.value_loss import value_loss
from warpo.kernels._triton.vtrace import vtrace
from warpo.kernels._triton.whiten import whiten_backward, whiten_forward

__all__ = [
    "adamw_publish",
    "aggregate_backward",
    "aggregate_forward",
    "approx_kl_backward",
    "approx_kl_forward",
    "fingerprint",
    "gae_backward",
    "gae_forward",
    "group_advantages_backward",
    "group_advantages_forward",
    "kept_set_logprobs_backward",
    "kept_set_logprobs_forward",
    "kept_set_weight_gradient",
    "kto_loss",
    "logprobs_backward",
    "logprobs_forward",
    "n_step_advantages",
    "policy_loss",
    "policy_loss_from_logits",
    "preference_loss",
    "process_advantages",
    "ranking_loss",
    "reward_model_loss",
    "scale_gradient",
    "shaped_gae",
    "soft_q_targets",
    "squashed_gaussian_backward",
    "squashed_gaussian_forward",
    "value_loss",
    "vtrace",
    "whiten_backward",
    "whiten_forward",
]
