"""The structs of csrc/arguments/squashed_gaussian.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class SquashedGaussianArguments(NamedTuple):
    rows: int
    columns: int
    mean: Tensor
    log_std: Tensor
    noise: Tensor
    log_std_min: float
    log_std_max: float
    actions: Tensor | None
    logprobs: Tensor | None


class SquashedGaussianBackwardArguments(NamedTuple):
    forward: SquashedGaussianArguments
    grad_actions: Tensor | None
    grad_logprobs: Tensor | None
    grad_mean: Tensor
    grad_log_std: Tensor
