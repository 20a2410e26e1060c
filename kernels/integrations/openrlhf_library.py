"""OpenRLHF, on which the modules openrlhf_* register their replacements."""

import torch
from torch import Tensor

from warpo.kernels.integrations.patching import Library

library = Library("openrlhf", tested=("0.11.2",))

LOSSES = "openrlhf.models.loss"
UTILITIES = "openrlhf.models.utils"
EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"


def promoted(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """What PyTorch computes in where it combines these tensors, None standing for no argument."""
    dtype = first.dtype
    for x in others:
        if x is not None and x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def same_shape(first: Tensor, *others: Tensor | None) -> bool:
    shape = first.shape
    for x in others:  # noqa: SIM110  (a generator takes twice as long, of few microseconds)
        if x is not None and x.shape != shape:
            return False
    return True


def constant(*tensors: Tensor | None) -> bool:
    """Whether no gradient is wanted with respect to these."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return False
    return True
