"""The structs of csrc/arguments/policy_loss.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

# kMinPartials: rows of the workspace at least
MIN_PARTIALS = 512


class ObjectiveArguments(NamedTuple):
    ratio_level: int
    surrogate: int
    ratio_low: float
    ratio_high: float
    dual_clip: float
    tau_positive: float
    tau_negative: float
    correction: int
    correction_sequence: bool
    correction_low: float
    correction_high: float
    kl_straight_through: bool
    entropy_coef: float
    log_ratio_limit: float
    sequence_mean: bool


class KlPenaltyArguments(NamedTuple):
    kl: int
    kl_coef: float
    adaptive_kl_coef: Tensor | None


class PolicyLossArguments(NamedTuple):
    objective: ObjectiveArguments
    kl_penalty: KlPenaltyArguments
    sequences: int
    steps: int
    cu_seqlens: Tensor | None
    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    entropy: Tensor | None
    mask: Tensor | None
    denominator: Tensor
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    partials: Tensor
    loss: Tensor
    metrics: Tensor
