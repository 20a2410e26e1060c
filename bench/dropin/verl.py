"""The functions of verl that are replaced, at the sizes at which they are timed."""

from warpo.bench.dropin import verl_advantages, verl_logprobs, verl_losses
from warpo.bench.dropin.case import DropIn


def cases() -> list[DropIn]:
    return [*verl_logprobs.cases(), *verl_advantages.cases(), *verl_losses.cases()]
