"""The functions of OpenRLHF that have replacements, and the modules they are in."""

from torch import Tensor

from warpo.kernels.integrations.patching import Library

library = Library("openrlhf", tested=("0.11.2",))

LOSSES = "openrlhf.models.loss"
UTILITIES = "openrlhf.models.utils"
EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"


def same_shape(first: Tensor, *others: Tensor | None) -> bool:
    shape = first.shape
    for x in others:  # noqa: SIM110  (a generator takes twice as long, of few microseconds)
        if x is not None and x.shape != shape:
            return False
    return True
