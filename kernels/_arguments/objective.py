"""The struct of csrc/arguments/objective.h, which describes the fields.

Without torch: `objectives`, which configs read, makes one for each row.
"""

from typing import NamedTuple


class ObjectiveArguments(NamedTuple):
    ratio_level: int
    surrogate: int
    ratio_low: float
    ratio_high: float
    dual_clip: float
    tau_positive: float
    tau_negative: float
    power_positive: float
    power_negative: float
    rate_positive: float
    rate_negative: float
    correction: int
    correction_sequence: bool
    correction_low: float
    correction_high: float
    kl_straight_through: bool
    kl_sequence: bool
    entropy_coef: float
    log_ratio_limit: float
    sequence_mean: bool
