"""TRL's functions, as its trainers call them."""

from warpo.bench.dropin.case import DropIn
from warpo.bench.dropin.trl import logprobs, policy, preferences


def cases() -> list[DropIn]:
    return [*logprobs.cases(), *policy.cases(), *preferences.cases()]
