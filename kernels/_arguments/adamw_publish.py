"""The structs of csrc/arguments/adamw_publish.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class AdamwPublishArguments(NamedTuple):
    rows: int
    columns: int
    grad: Tensor
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    published: Tensor
    decay: float
    grad_weight: float
    beta2: float
    square_weight: float
    step_size: float
    root_scale: float
    eps: float
    grad_scale: float
    grad_scale_factor: Tensor | None
    stochastic: int
    seed: int
    step: int
    partial_counts: Tensor
    partial_updates: Tensor
    counts: Tensor
    updates: Tensor
