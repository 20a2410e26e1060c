"""OpenRLHF, on which the modules openrlhf_* register their replacements."""

import functools

import torch
from torch import Tensor

from warpo.kernels.integrations.patching import Library

library = Library("openrlhf", tested=("0.11.2",))

LOSSES = "openrlhf.models.loss"
UTILITIES = "openrlhf.models.utils"
EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """What PyTorch computes in where it combines these tensors, None standing for no argument."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])


def same_shape(first: Tensor, *others: Tensor | None) -> bool:
    return all(x is None or x.shape == first.shape for x in others)


def constant(*tensors: Tensor | None) -> bool:
    """Whether no gradient is wanted with respect to these."""
    return not torch.is_grad_enabled() or not any(
        x is not None and x.requires_grad for x in tensors
    )
