"""The structs of csrc/arguments/soft_q_targets.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class SoftQTargetsArguments(NamedTuple):
    transitions: int
    rewards: Tensor
    terminated: Tensor
    next_q1: Tensor
    next_q2: Tensor
    next_logprobs: Tensor
    alpha: Tensor
    gamma: float
    targets: Tensor
