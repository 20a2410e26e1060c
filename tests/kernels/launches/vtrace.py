"""Launches of the Triton kernel of vtrace, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from tests.kernels.launches.gae import CARRY, COMPACT, Launch, per_step


def vtrace(
    rows: int, steps: int, layout: str, full: bool, mask_mode: int, rho_max: float = 1.0
) -> None:
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    final = token if full else None
    masks = [flags(token, full) for _ in range(3)]
    _triton.vtrace(
        rows, steps, cu_seqlens, token, None, token, torch.empty(rows, 1), final, *masks, None,
        None, 0.99, 1.0, mask_mode, False, token, token, token, token, rho_max, 1.0, 2 * rho_max,
        20.0,
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout, steps in (
        ("dense time", 10), ("dense time", 100), ("dense time", 2000), ("dense rows", 50),
        ("packed", 50),
    ):  # fmt: skip
        yield f"{layout} {steps} flags", partial(vtrace, 64, steps, layout, True, COMPACT)
        if all_of_them:
            yield f"{layout} {steps}", partial(vtrace, 64, steps, layout, False, CARRY)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 17), (2, 128), (16, 37)):
        yield partial(vtrace, rows, steps, "dense time", True, COMPACT, float("inf"))
        yield partial(vtrace, 2 * rows, steps + 1, "dense rows", False, CARRY, 1.5)
        yield partial(vtrace, rows + 1, steps, "packed", True, COMPACT)
