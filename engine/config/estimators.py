"""The estimators of advantages and their baselines: the facts that others ask for, without the
arithmetic.

What computes one stands under the same name in engine/learner/advantages.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Facts about an advantage estimator that other parts ask for.

    Attributes:
        text: the formula, in words; the row adds its baseline, and composes that of "outcome".
        needs_critic: it reads values of states.
        needs_group: it compares a completion with others of its prompt, so there must be two.
        needs_steps: it reads rewards of steps.
        needs_sources: it reads the reward of each source.
        compares_subsets: it reads loss.pass_at_k.
        makes_pairs: it weighs no token: right and wrong completions are paired.
        shapes_rewards: it can take the KL to the reference off the rewards.
        reads_baseline: it subtracts loss.baseline.
        is_causal: it gives rewards of tokens, of which every optimizer step makes returns, weighed
            by the ratios of the policy that learns.
    """

    text: str
    needs_critic: bool = False
    needs_group: bool = False
    needs_steps: bool = False
    needs_sources: bool = False
    compares_subsets: bool = False
    makes_pairs: bool = False
    shapes_rewards: bool = False
    reads_baseline: bool = False
    is_causal: bool = False


ESTIMATORS = {
    "outcome": Estimator(text="", shapes_rewards=True, reads_baseline=True),
    "causal": Estimator(
        text="reward-to-go, weighed by the ratios of its tokens",
        shapes_rewards=True,
        reads_baseline=True,
        is_causal=True,
    ),
    "process": Estimator(
        text="normalised rewards of the steps from here on",
        needs_group=True,
        needs_steps=True,
    ),
    "decoupled": Estimator(
        text=(
            "rewards normalised in the group, each source by itself; their weighted sum, "
            "normalised over the batch"
        ),
        needs_group=True,
        needs_sources=True,
    ),
    "pass_at_k_training": Estimator(
        text="normalised best rewards of k completions, mean over the subsets with this one",
        needs_group=True,
        compares_subsets=True,
    ),
    "pkpo": Estimator(
        text="what the completion adds to the best reward of k - 1 others",
        needs_group=True,
        compares_subsets=True,
    ),
    "gae": Estimator(
        text="generalised advantage estimation (GAE) with a critic",
        needs_critic=True,
        shapes_rewards=True,
    ),
    "pairs": Estimator(
        text="none: right and wrong completions of a prompt are paired",
        needs_group=True,
        makes_pairs=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Facts about what "outcome" subtracts from the reward of a completion.

    Attributes:
        text: of which the table of algorithms makes "reward - TEXT"; empty: nothing is subtracted.
        of_group: it is made of rewards of the group, so there must be two; where these are all
            equal the advantages are 0.
        of_history: it is made of rewards of earlier steps.
        needs_greedy: it reads the reward of the greedy completion of the prompt.
    """

    text: str
    of_group: bool = False
    of_history: bool = False
    needs_greedy: bool = False


BASELINES = {
    "none": Baseline(text=""),
    "history": Baseline(text="mean of the rewards of all earlier steps", of_history=True),
    "moving": Baseline(text="moving average of the rewards of earlier steps", of_history=True),
    "batch": Baseline(text="mean of the step"),
    "group": Baseline(text="mean of the group", of_group=True),
    "leave_one_out": Baseline(text="mean of the other completions of the group", of_group=True),
    "optimal": Baseline(text="mean of the group, weighted by length", of_group=True),
    "greedy": Baseline(text="reward of the greedy completion of the prompt", needs_greedy=True),
}
