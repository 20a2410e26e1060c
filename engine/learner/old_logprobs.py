"""Where the old_logprobs of a step come from: the policy that it begins with, w0.

update     a step of one optimizer step: its own forward pass computes with w0. The ratio is 1,
           and weighs the gradient only
sampler    recorded while it drew, where the learner gives a completion of every prompt the same
learner    a forward pass over all rollouts
"""

from __future__ import annotations

import math

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.policy import Config
from warpo.engine.learner.drift import Drift
from warpo.engine.learner.minibatches import one_of_each_group
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.run.log import Log
from warpo.kernels.objectives import Objective

# Sampler logprobs within this of the learner's serve as old_logprobs: they move a ratio by 0.01 %.
EQUAL_LOGPROBS = 1e-4


def are_the_updates(config: Config, algorithm: Algorithm, step: int) -> bool:
    """True if nothing reads old_logprobs before the first optimizer step after `step` steps, and no
    second one follows it.
    """
    return (
        config.update.per_step == 1
        and step >= config.critic.warmup_steps
        and isinstance(algorithm.objective, Objective)
        and not algorithm.needs_old_logprobs
    )


def sampler_serves(
    config: Config, algorithm: Algorithm, rollouts: StepRollouts, drift: Drift
) -> bool:
    """True if those that the sampler recorded serve: nothing corrects for the sampler, every token
    can be drawn, and the learner gives a completion of every prompt the same logprobs.
    """
    if _correction(algorithm) not in (None, "none") or config.rollout.truncated:
        return False
    if drift.sampling_difference <= EQUAL_LOGPROBS:
        drift.widen(one_of_each_group(rollouts), config.update.token_budget)
    return drift.sampling_difference <= EQUAL_LOGPROBS


def say_what_is_uncorrected(config: Config, algorithm: Algorithm, drift: Drift, log: Log) -> None:
    """Say once that the rollouts are off-policy and nothing corrects for it, where that is so."""
    if _correction(algorithm) != "none":
        return
    if config.rollout.truncated:
        why = "rollout.top_p or top_k truncate what is sampled"
    elif drift.sampling_difference <= EQUAL_LOGPROBS:
        return
    elif math.isinf(drift.sampling_difference):
        why = "probe.num_sequences = 0"
    else:
        why = f"a logprob is {drift.sampling_difference:.1e} from the sampler's"
    log.say_once(
        "loss.correction",
        f"old_logprobs are the learner's, as {why}: the gradient does not correct for the sampler, "
        "since loss.correction is none; truncate_token would",
    )


def _correction(algorithm: Algorithm) -> str | None:
    objective = algorithm.objective
    return objective.correction if isinstance(objective, Objective) else None
