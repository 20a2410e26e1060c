"""Every operation in plain PyTorch: the definition that all backends are tested against.

Any floating dtype up to float64, differentiable by autograd, no speed intended. Arguments mean what
they mean in `ops`; they are checked there. Masked slots are replaced before any arithmetic, so that
NaN in them reaches neither results nor gradients.
"""

from warpo.kernels.reference.gae import gae
from warpo.kernels.reference.group_advantages import group_advantages
from warpo.kernels.reference.kept_set_logprobs import kept_set_logprobs
from warpo.kernels.reference.linear_logprobs import linear_logprobs
from warpo.kernels.reference.logprobs import logprobs
from warpo.kernels.reference.policy_loss import kl_estimate, policy_loss

__all__ = [
    "gae",
    "group_advantages",
    "kept_set_logprobs",
    "kl_estimate",
    "linear_logprobs",
    "logprobs",
    "policy_loss",
]
