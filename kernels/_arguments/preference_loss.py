"""The structs of csrc/arguments/preference_loss.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels._arguments.denominator import DenominatorArguments

# kCompletionSlices: each has four floats of the workspace
COMPLETION_SLICES = 32


class CompletionsArguments(NamedTuple):
    steps: int
    cu_seqlens: Tensor | None
    logprobs: Tensor
    ref_logprobs: Tensor | None
    mask: Tensor | None
    grad_logprobs: Tensor | None


class PreferenceLossArguments(NamedTuple):
    pairs: int
    chosen: CompletionsArguments
    rejected: CompletionsArguments
    link: int
    length_normalise: bool
    odds: bool
    beta: float
    margin: float
    positive_weight: float
    negative_weight: float
    nll_coef: float
    denominator: DenominatorArguments
    partials: Tensor
    loss: Tensor
    metrics: Tensor


class KtoLossArguments(NamedTuple):
    examples: int
    completions: CompletionsArguments
    desirable: Tensor
    kl: Tensor
    beta: float
    desirable_weight: float
    undesirable_weight: float
    denominator: DenominatorArguments
    partials: Tensor
    loss: Tensor
    metrics: Tensor
