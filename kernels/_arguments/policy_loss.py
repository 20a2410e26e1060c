"""The structs of csrc/arguments/policy_loss.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.objective import ObjectiveArguments

# kMinPartials: rows of the workspace at least
MIN_PARTIALS = 512


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
    denominator: DenominatorArguments
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    partials: Tensor
    loss: Tensor
    metrics: Tensor
