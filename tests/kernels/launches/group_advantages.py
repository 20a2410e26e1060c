"""Launches of the Triton kernels of group_advantages, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.group_advantages import (
    GroupAdvantagesArguments,
    GroupAdvantagesBackwardArguments,
)

Launch = tuple[str, Callable[[], None]]


def group_advantages(
    std: int, leave_one_out: bool, by_id: bool, groups: int = 4, weighted: bool = False
) -> None:
    from warpo.kernels import _triton

    completions = torch.empty(8 * groups)
    order, offsets = (torch.empty(n, dtype=torch.int64) for n in (8 * groups, groups + 1))
    statistic = torch.empty(groups)
    forward = GroupAdvantagesArguments(
        groups=groups,
        rewards=completions,
        lengths=completions if weighted else None,
        group_size=0 if by_id else 8,
        order=order if by_id else None,
        offsets=offsets if by_id else None,
        std_mode=std,
        leave_one_out=leave_one_out,
        eps=1e-6,
        advantages=completions,
        mean=statistic,
        std=statistic,
        degenerate=torch.zeros((), dtype=torch.int32),
    )
    _triton.group_advantages_forward(forward)
    backward = GroupAdvantagesBackwardArguments(
        forward=forward, grad_advantages=completions, grad_rewards=completions
    )
    _triton.group_advantages_backward(backward)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for std in range(4) if all_of_them else (1,):
        by_id = std == 1
        yield f"std {std}{' by id' * by_id}", partial(group_advantages, std, by_id, by_id)
    yield "length weighted", partial(group_advantages, 0, False, True, weighted=True)


def variations() -> Iterator[Callable[[], None]]:
    for groups in (1, 2, 16):
        yield partial(group_advantages, 1, True, True, groups=groups)
