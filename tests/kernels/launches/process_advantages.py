"""Launches of the Triton kernel of process_advantages, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.process_advantages import ProcessAdvantagesArguments

Launch = tuple[str, Callable[[], None]]


def process_advantages(
    std: int, by_id: bool, packed: bool, outputs: int = 4, tokens: int = 100
) -> None:
    from warpo.kernels import _triton

    steps = torch.empty(8 * outputs)
    index = torch.empty(8 * outputs, dtype=torch.int64 if by_id else torch.int32)
    cu_seqlens = torch.empty(outputs + 1, dtype=torch.int32) if packed else None
    group_ids, order, offsets = (
        torch.empty(outputs + 1, dtype=torch.int64) if by_id else None for _ in range(3)
    )
    arguments = ProcessAdvantagesArguments(
        outputs=outputs,
        groups=2,
        steps=8 * outputs,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        step_rewards=steps,
        step_offsets=index[: outputs + 1],
        step_ends=index,
        group_size=0 if by_id else 2,
        group_ids=group_ids,
        order=order,
        offsets=offsets,
        std_mode=std,
        eps=1 / tokens,
        advantages=steps,
        mean=steps,
        std=steps,
        degenerate=torch.zeros((), dtype=torch.int32),
    )
    _triton.process_advantages(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for std in range(3) if all_of_them else (1,):
        by_id = std == 1
        yield f"std {std}{' by id packed' * by_id}", partial(process_advantages, std, by_id, by_id)


def variations() -> Iterator[Callable[[], None]]:
    for outputs, tokens in ((1, 1), (2, 16), (16, 4097)):
        yield partial(process_advantages, 1, True, True, outputs, tokens)
        yield partial(process_advantages, 2, False, False, outputs, tokens)
