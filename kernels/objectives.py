"""Published objectives as data: what a policy loss is made of, and one row for each paper.

ratio     = exp(logp - old), per token, or its geometric mean over the sequence
surrogate = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
loss_t    = -surrogate + kl_coef * kl(logp, ref)
loss      = aggregate(loss_t) over the valid tokens, with an explicit denominator
"""

from dataclasses import dataclass, replace
from typing import Any

RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-sum",
    "sequence-mean-token-sum-norm",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A clipped policy objective.

    Attributes:
        ratio_level: "token": exp(logp_t - old_t). "sequence": exp of the mean of logp_t - old_t
            over the valid tokens, the same for each of them.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        kl_coef: weight of the KL term; 0 leaves it out, and no reference is needed.
        kl_estimator: with d = ref - logp: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d
            (http://joschu.net/blog/kl-approx.html).
        aggregation: how the losses of the tokens become one number, before it is divided by
            `denominator`: "token-mean"                    sum over tokens; denominator: number of
            valid tokens "sequence-mean-token-mean"      sum over sequences of their token mean;
            number of sequences "sequence-mean-token-sum"       sum over tokens; number of sequences
            "sequence-mean-token-sum-norm"  sum over tokens; number of sequences x a constant length
        log_ratio_limit: arguments of exp are clamped to +- this; the gradient is 0 where they are.
    """

    ratio_level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    aggregation: str = "token-mean"
    log_ratio_limit: float = 20.0

    def __post_init__(self) -> None:
        _check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        _check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must be in [0, 1], got {self.clip_low}")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high must be >= 0, got {self.clip_high}")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must be >= 0, got {self.kl_coef}")
        if not 0 < self.log_ratio_limit <= 80:
            raise ValueError(
                f"log_ratio_limit must be in (0, 80], got {self.log_ratio_limit}: "
                "exp overflows float32 above 88"
            )

    def replace(self, **changes: Any) -> "Objective":
        """The same objective with some fields changed."""
        return replace(self, **changes)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


OBJECTIVES: dict[str, Objective] = {
    # https://arxiv.org/abs/1707.06347 eq. 7; the KL shapes the reward, not the loss
    "ppo": Objective(),
    # https://arxiv.org/abs/2402.03300 eq. 3 and 4
    "grpo": Objective(kl_coef=0.04, aggregation="sequence-mean-token-mean"),
    # https://arxiv.org/abs/2503.20783 section 3.2: no length and no std normalisation
    "dr_grpo": Objective(aggregation="sequence-mean-token-sum-norm"),
    # https://arxiv.org/abs/2503.14476 eq. 8: clip-higher, token-level loss, no KL
    "dapo": Objective(clip_low=0.2, clip_high=0.28),
    # https://arxiv.org/abs/2507.18071 eq. 5, bounds of its section 5.1
    "gspo": Objective(
        ratio_level="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence-mean-token-mean",
    ),
}


def get_objective(objective: "str | Objective") -> Objective:
    """The row of that name, or the objective itself.

    Raises:
        ValueError: no row has that name; the message lists those that exist.
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    return OBJECTIVES[objective]
