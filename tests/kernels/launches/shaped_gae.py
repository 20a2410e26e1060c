"""Launches of the Triton kernel of shaped_gae, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from tests.kernels.launches.gae import CARRY, COMPACT, Launch, gae_arguments, per_step
from warpo.kernels._arguments.gae import ShapedGaeArguments


def shaped_gae(
    rows: int, steps: int, layout: str, kl: int, full: bool, mask_mode: int, coef: float = 0.1
) -> None:
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    column, adaptive = torch.empty(rows, 1), torch.empty(()) if full else None
    gae = gae_arguments(
        rows,
        steps,
        cu_seqlens,
        token,
        rewards=token if full else None,
        terminal_rewards=column,
        values=token,
        last_values=column if full else None,
        mask=flags(token, full),
        gamma=1 - coef,
        gae_lambda=0.95,
        mask_mode=mask_mode,
        starts_at_t=False,
    )
    arguments = ShapedGaeArguments(
        gae=gae,
        logprobs=token,
        ref_logprobs=token,
        kl=kl,
        kl_coef=coef,
        adaptive_kl_coef=adaptive,
        entropy_coef=coef / 2,
        log_ratio_limit=100 * coef,
        shaped_rewards=token if full else None,
    )
    _triton.shaped_gae(arguments)


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
