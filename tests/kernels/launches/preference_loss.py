"""Launches of the Triton kernels of preference_loss and kto_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def _side(dtype: torch.dtype, packed: bool, ref: bool, mask: bool, rows: int, steps: int) -> tuple:
    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    gradient = torch.empty(rows, steps)
    return steps, cu_seqlens, token, token if ref else None, flags(token, mask), gradient


def preference_loss(
    dtype: torch.dtype, packed: bool, ref: bool, mask: bool, link: int, odds: bool = False,
    rows: int = 4, steps: int = 100, beta: float = 0.1,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    side, scalar = _side(dtype, packed, ref, mask, rows, steps), torch.empty(())
    _triton.preference_loss(
        rows, *side, *side, link, odds, odds, beta, 2 * beta, 1 - beta, beta, 0.0, scalar,
        torch.empty(rows, 8), scalar, torch.empty(8),
    )  # fmt: skip


def kto_loss(dtype: torch.dtype, packed: bool, mask: bool, rows: int = 4, steps: int = 100) -> None:
    from warpo.kernels import _triton

    side, scalar = _side(dtype, packed, True, mask, rows, steps), torch.empty(())
    desirable = torch.ones(rows, dtype=torch.bool)
    _triton.kto_loss(
        rows, *side, desirable, scalar, 1 / rows, 1.0, 1 / steps, scalar, torch.empty(rows, 7),
        scalar, torch.empty(7),
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "odds mask", partial(preference_loss, torch.bfloat16, False, False, True, 0, True)
    yield "mask", partial(kto_loss, torch.bfloat16, False, True)
    if all_of_them:
        for link in range(3):
            label = f"packed link {link}"
            yield label, partial(preference_loss, torch.float32, True, True, False, link)
        yield "packed", partial(kto_loss, torch.float32, True, False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        for link in range(3):
            yield partial(
                preference_loss,
                torch.float32,
                True,
                True,
                False,
                link,
                False,
                rows,
                steps,
                1 / rows,
            )
        yield partial(kto_loss, torch.bfloat16, False, True, rows, steps)
