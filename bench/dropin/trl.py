"""TRL's functions, as its trainers call them."""

from warpo.bench.dropin import trl_logprobs, trl_policy, trl_preferences
from warpo.bench.dropin.case import DropIn


def cases() -> list[DropIn]:
    return [*trl_logprobs.cases(), *trl_policy.cases(), *trl_preferences.cases()]
