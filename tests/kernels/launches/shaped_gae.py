"""Launches of the Triton kernel of shaped_gae, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from tests.kernels.launches.gae import CARRY, COMPACT, Launch, per_step


def shaped_gae(
    rows: int, steps: int, layout: str, kl: int, full: bool, mask_mode: int, coef: float = 0.1
) -> None:
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    column, adaptive = torch.empty(rows, 1), torch.empty(()) if full else None
    _triton.shaped_gae(
        rows, steps, cu_seqlens, token if full else None, column, token, column if full else None,
        None, flags(token, full), None, None, None, None, 1 - coef, 0.95, mask_mode, False,
        token, token, token, token, kl, coef, adaptive, 100 * coef, token if full else None,
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for kl in range(1, 4) if all_of_them else (3,):
        for layout, steps in (("dense time", 100), ("dense time", 2000), ("packed", 50)):
            label = f"{layout} {steps} k{kl}"
            yield f"{label} mask", partial(shaped_gae, 64, steps, layout, kl, True, COMPACT)
    if all_of_them:
        for layout in ("dense rows", "packed"):
            yield f"{layout} k3", partial(shaped_gae, 64, 50, layout, 3, False, CARRY)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 17), (2, 128), (16, 37)):
        coef = 1 / rows
        yield partial(shaped_gae, rows, steps, "dense time", 2, True, COMPACT, coef)
        yield partial(shaped_gae, rows, steps, "packed", 3, True, COMPACT, coef)
