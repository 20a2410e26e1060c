"""The structs of csrc/arguments/group_advantages.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class GroupAdvantagesArguments(NamedTuple):
    groups: int
    rewards: Tensor
    lengths: Tensor | None
    group_size: int
    order: Tensor | None
    offsets: Tensor | None
    std_mode: int
    leave_one_out: bool
    eps: float
    advantages: Tensor | None
    mean: Tensor
    std: Tensor
    degenerate: Tensor | None


class GroupAdvantagesBackwardArguments(NamedTuple):
    forward: GroupAdvantagesArguments
    grad_advantages: Tensor
    grad_rewards: Tensor
