"""The structs of csrc/arguments/policy_loss_from_logits.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.logprobs import LogprobsArguments
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments


class PolicyLossFromLogitsArguments(NamedTuple):
    objective: ObjectiveArguments
    kl_penalty: KlPenaltyArguments
    forward: LogprobsArguments
    sequences: int
    cu_seqlens: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    valid_tokens: Tensor | None
    denominator: DenominatorArguments
    grad_logits: Tensor


class ScaleGradientArguments(NamedTuple):
    rows: int
    steps: int
    vocab: int
    gradient: Tensor
    factor: Tensor
