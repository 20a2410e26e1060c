"""Launches of the Triton kernel of vtrace, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from tests.kernels.launches.gae import (
    CARRY,
    COMPACT,
    LAYOUTS,
    Launch,
    gae_arguments,
    per_step,
)
from warpo.kernels._arguments.gae import VtraceArguments


def vtrace(
    rows: int, steps: int, layout: str, full: bool, mask_mode: int, rho_max: float = 1.0
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
        last_values=torch.empty(rows, 1),
        final_values=token if full else None,
        mask=flags(token, full),
        terminated=flags(token, full),
        truncated=flags(token, full),
        gamma=0.99,
        gae_lambda=1.0,
        mask_mode=mask_mode,
        starts_at_t=False,
    )
    arguments = VtraceArguments(
        gae=gae,
        logprobs=token,
        old_logprobs=token,
        rho_max=rho_max,
        c_max=1.0,
        pg_rho_max=2 * rho_max,
        log_ratio_limit=20.0,
        weighs_advantages=True,
    )
    _triton.vtrace(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout, steps in LAYOUTS:
        yield f"{layout} {steps} flags", partial(vtrace, 64, steps, layout, True, COMPACT)
        if all_of_them:
            yield f"{layout} {steps}", partial(vtrace, 64, steps, layout, False, CARRY)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 17), (2, 128), (16, 37)):
        yield partial(vtrace, rows, steps, "dense time", True, COMPACT, float("inf"))
        yield partial(vtrace, 2 * rows, steps + 1, "dense rows", False, CARRY, 1.5)
        yield partial(vtrace, rows + 1, steps, "packed", True, COMPACT)
