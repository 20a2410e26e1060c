"""The structs of csrc/arguments/adamw_publish.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class AdamwTensorArguments(NamedTuple):
    published: Tensor
    grad: Tensor
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step_size: float
    root_scale: float
    seed: int
    step: int


class AdamwPublishArguments(NamedTuple):
    tensors: list[AdamwTensorArguments]
    decay: float
    grad_weight: float
    beta2: float
    square_weight: float
    eps: float
    grad_scale: float
    grad_scale_factor: Tensor | None
    stochastic: int
    partial_counts: Tensor
    partial_updates: Tensor
    counts: Tensor
    updates: Tensor
