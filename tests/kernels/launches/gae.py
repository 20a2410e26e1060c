"""Launches of the Triton kernels of gae, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]
CARRY, COMPACT = 0, 2


def per_step(rows: int, steps: int, layout: str) -> tuple[int, Tensor, Tensor | None]:
    """Steps in all, a tensor of that layout, and cu_seqlens."""
    if layout == "packed":
        return rows * steps, torch.empty(rows * steps), torch.zeros(rows + 1, dtype=torch.int32)
    if layout == "dense rows":
        return steps, torch.empty(steps, rows).t(), None
    if layout == "strided":
        return steps, torch.empty(rows, 2 * steps)[:, ::2], None
    return steps, torch.empty(rows, steps), None


def gae(
    rows: int, steps: int, layout: str, full: bool, starts_at_t: bool = False,
    mask_mode: int = CARRY, gamma: float = 0.99,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    last = torch.empty(rows, 1)
    final = token if full else None
    last_flag = flags(last, full and starts_at_t)
    masks = [flags(token, full) for _ in range(3)]
    options = (gamma, 0.95, mask_mode, starts_at_t)
    _triton.gae_forward(
        rows, steps, cu_seqlens, token, None, token, last, final, *masks, last_flag, last_flag,
        *options, token, token,
    )  # fmt: skip
    _triton.gae_backward(
        rows, steps, cu_seqlens, None, None, None, None, final, *masks, last_flag, last_flag,
        *options, None, None, token, token, token, token, last, final,
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout, steps in (
        ("dense time", 10), ("dense time", 100), ("dense time", 2000), ("dense rows", 50),
        ("packed", 50),
    ):  # fmt: skip
        yield f"{layout} {steps} flags", partial(gae, 64, steps, layout, True, mask_mode=COMPACT)
        if all_of_them:
            yield f"{layout} {steps}", partial(gae, 64, steps, layout, False)
            yield f"{layout} {steps} starts_at_t", partial(gae, 64, steps, layout, True, True)
    if all_of_them:
        yield "strided flags", partial(gae, 64, 50, "strided", True)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        yield partial(gae, rows, steps, "dense time", True, mask_mode=COMPACT, gamma=0.9)
        yield partial(gae, rows, 129 + 16 * steps, "dense time", True, True)
        yield partial(gae, 2 * rows, steps + 1, "dense rows", True, True)
        yield partial(gae, rows + 1, steps, "packed", True, mask_mode=COMPACT, gamma=1.0)
