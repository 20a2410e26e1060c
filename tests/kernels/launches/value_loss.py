"""Launches of the Triton kernels of value_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def value_loss(
    dtype: torch.dtype, packed: bool, clip: bool, mean: bool,
    rows: int = 4, steps: int = 100, clip_range: float = 0.2,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    scalar = torch.empty(())
    _triton.value_loss(
        rows, steps, cu_seqlens, token, token if clip else None, token, flags(token, mean), mean,
        clip_range, 2 * clip_range, scalar, torch.empty(rows, steps), torch.empty(rows, 7), scalar,
        torch.empty(7),
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "packed clip", partial(value_loss, torch.float32, True, True, False)
    if all_of_them:
        yield "mean mask clip", partial(value_loss, torch.bfloat16, False, True, True)
        yield "plain", partial(value_loss, torch.bfloat16, False, False, False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        yield partial(value_loss, torch.bfloat16, False, True, True, rows, steps, 1 / rows)
