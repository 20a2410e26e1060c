"""Every operation in plain PyTorch: the definition that all backends are tested against.

Any floating dtype up to float64, differentiable by autograd, no speed intended. Arguments mean what
they mean in `ops`; they are checked there. Masked slots are replaced before any arithmetic, so that
NaN in them reaches neither results nor gradients.
"""

from warpo.kernels.reference.gae import discounted_returns, gae, lambda_returns
from warpo.kernels.reference.group_advantages import group_advantages
from warpo.kernels.reference.logprobs import logprobs
from warpo.kernels.reference.policy_loss import kl_estimate, policy_loss
from warpo.kernels.reference.shaped_gae import shaped_gae
from warpo.kernels.reference.vtrace import vtrace
from warpo.kernels.reference.whiten import whiten

__all__ = [
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_estimate",
    "lambda_returns",
    "logprobs",
    "policy_loss",
    "shaped_gae",
    "vtrace",
    "whiten",
]
