"""The estimators of advantages: the facts that others ask for, without the arithmetic.

What computes one stands under the same name in engine/learner/advantages.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Facts about an advantage estimator that other parts ask for.

    Attributes:
        text: the formula, in words.
        needs_critic: it reads values of states.
        needs_group: it compares a completion with others of its prompt, so there must be two.
        needs_greedy: it reads the reward of the greedy completion of the prompt.
        needs_steps: it reads rewards of steps.
        makes_pairs: it weighs no token: right and wrong completions are paired.
        shapes_rewards: it takes the KL to the reference off the rewards.
        reads_std: it divides by loss.advantage_std.
    """

    text: str
    needs_critic: bool = False
    needs_group: bool = False
    needs_greedy: bool = False
    needs_steps: bool = False
    makes_pairs: bool = False
    shapes_rewards: bool = False
    reads_std: bool = False

    @property
    def may_redraw(self) -> bool:
        """True if groups of one reward tell it nothing, so that others may be drawn instead."""
        return self.needs_group and not self.needs_steps and not self.makes_pairs


ESTIMATORS = {
    "group": Estimator(
        text="reward - mean of the group, over its standard deviation",
        needs_group=True,
        reads_std=True,
    ),
    "rescaled group": Estimator(
        text="reward - mean of the group, times groups over groups of unequal rewards",
        needs_group=True,
    ),
    "leave one out": Estimator(
        text="reward - mean of the other completions of the group",
        needs_group=True,
        shapes_rewards=True,
    ),
    "moving average": Estimator(
        text="reward - moving average of the rewards of earlier steps",
        shapes_rewards=True,
    ),
    "greedy": Estimator(
        text="reward - reward of the greedy completion of the prompt",
        needs_greedy=True,
        shapes_rewards=True,
    ),
    "batch": Estimator(
        text="reward-to-go of the KL-shaped reward, normalised over the batch",
        shapes_rewards=True,
    ),
    "group, batch": Estimator(
        text="reward - mean of the group, normalised over the batch",
        needs_group=True,
    ),
    "process": Estimator(
        text="normalised rewards of the steps from here on",
        needs_group=True,
        needs_steps=True,
        reads_std=True,
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
