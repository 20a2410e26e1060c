"""The structs of csrc/arguments/approx_kl.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class ApproxKlArguments(NamedTuple):
    rows: int
    columns: int
    logprobs: Tensor
    ref_logprobs: Tensor
    mask: Tensor | None
    estimator: int
    limit: float
    kl: Tensor


class ApproxKlBackwardArguments(NamedTuple):
    rows: int
    columns: int
    logprobs: Tensor
    ref_logprobs: Tensor
    weight: Tensor | None
    mask: Tensor | None
    estimator: int
    straight_through: bool
    limit: float
    grad_kl: Tensor
    grad_logprobs: Tensor | None
    grad_ref: Tensor | None
