"""Launches of the Triton kernels of gae, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def gae(
    rows: int, steps: int, layout: str, full: bool, starts_at_t: bool = False, gamma: float = 0.99
) -> None:
    from warpo.kernels import _triton

    token = torch.empty(steps, rows).t() if layout == "dense rows" else torch.empty(rows, steps)
    if layout == "strided":
        token = torch.empty(rows, 2 * steps)[:, ::2]
    last = torch.empty(rows, 1)
    final = token if full else None
    last_flag = flags(last, full and starts_at_t)
    masks = [flags(token, full) for _ in range(3)]
    options = (gamma, 0.95, not starts_at_t, starts_at_t)
    _triton.gae_forward(
        rows, steps, token, token, last, final, *masks, last_flag, last_flag, *options, token, token
    )
    _triton.gae_backward(
        rows, steps, None, None, None, final, *masks, last_flag, last_flag, *options, None, None,
        token, token, token, token, last, final,
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout, steps in (("dense time", 100), ("dense time", 2000), ("dense rows", 50)):
        yield f"{layout} {steps} flags", partial(gae, 64, steps, layout, True)
        if all_of_them:
            yield f"{layout} {steps}", partial(gae, 64, steps, layout, False)
            yield f"{layout} {steps} starts_at_t", partial(gae, 64, steps, layout, True, True)
    if all_of_them:
        yield "strided flags", partial(gae, 64, 50, "strided", True)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        yield partial(gae, rows, steps, "dense time", True, gamma=0.9)
        yield partial(gae, rows, 129 + 16 * steps, "dense time", True)
        yield partial(gae, 2 * rows, steps + 1, "dense rows", True)
