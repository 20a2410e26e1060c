"""The functions of verl that are replaced, at the sizes at which they are timed."""

from warpo.bench.dropin.case import DropIn
from warpo.bench.dropin.verl import advantages, logprobs, losses


def cases() -> list[DropIn]:
    return [*logprobs.cases(), *advantages.cases(), *losses.cases()]
