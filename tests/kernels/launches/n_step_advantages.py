"""Launches of the Triton kernel of n_step_advantages, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from tests.kernels.launches.gae import CARRY, COMPACT, Launch, gae_arguments, per_step
from warpo.kernels._arguments.gae import NStepAdvantagesArguments

ZERO = 1


def n_step_advantages(
    rows: int, steps: int, layout: str, full: bool, mask_mode: int, n: int = 5
) -> None:
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    gae = gae_arguments(
        rows,
        steps,
        cu_seqlens,
        token,
        rewards=token,
        values=token,
        last_values=torch.empty(rows, 1) if full else None,
        mask=flags(token, full),
        gamma=1 / n,
        gae_lambda=1.0,
        mask_mode=mask_mode,
        starts_at_t=False,
    )
    _triton.n_step_advantages(NStepAdvantagesArguments(gae=gae, n=n))


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout in ("dense time", "packed"):
        yield f"{layout} mask", partial(n_step_advantages, 64, 100, layout, True, COMPACT)
    if all_of_them:
        yield "zero", partial(n_step_advantages, 64, 100, "dense time", True, ZERO)
        yield "dense time", partial(n_step_advantages, 64, 100, "dense time", False, CARRY)


def variations() -> Iterator[Callable[[], None]]:
    for rows in (1, 2, 16):
        yield partial(n_step_advantages, rows, 17 * rows, "dense time", True, COMPACT, rows)
        yield partial(n_step_advantages, rows, 16, "strided", True, COMPACT, 1)
        yield partial(n_step_advantages, rows + 1, 37, "packed", True, COMPACT)
