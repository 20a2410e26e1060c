"""The structs of csrc/arguments/process_advantages.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class ProcessAdvantagesArguments(NamedTuple):
    outputs: int
    groups: int
    steps: int
    tokens: int
    cu_seqlens: Tensor | None
    step_rewards: Tensor
    step_offsets: Tensor
    step_ends: Tensor
    group_size: int
    group_ids: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    std_mode: int
    eps: float
    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor
