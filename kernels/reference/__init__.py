"""Every operation in plain PyTorch: the definition that all backends are tested against.

Any floating dtype up to float64, differentiable by autograd, no speed intended. Arguments mean what
they mean in `ops`; they are checked there. Masked slots are replaced before any arithmetic, so that
NaN in them reaches neither results nor gradients.
"""

from warpo.kernels.reference.adamw_publish import adamw_publish
from warpo.kernels.reference.fingerprint import fingerprint
from warpo.kernels.reference.gae import gae
from warpo.kernels.reference.group_advantages import group_advantages
from warpo.kernels.reference.logprobs import logprobs
from warpo.kernels.reference.policy_loss import kl_estimate, policy_loss
from warpo.kernels.reference.process_advantages import process_advantages
from warpo.kernels.reference.whiten import whiten

__all__ = [
    "adamw_publish",
    "fingerprint",
    "gae",
    "group_advantages",
    "kl_estimate",
    "logprobs",
    "policy_loss",
    "process_advantages",
    "whiten",
]
