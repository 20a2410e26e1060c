"""Launches of the Triton kernel of off_policy_returns, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags
from tests.kernels.launches.gae import CARRY, COMPACT, Launch, gae_arguments, per_step
from warpo.kernels._arguments.gae import VtraceArguments


def off_policy_returns(
    rows: int, steps: int, layout: str, full: bool, mask_mode: int, gamma: float = 1.0
) -> None:
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    gae = gae_arguments(
        rows,
        steps,
        cu_seqlens,
        token,
        rewards=token,
        last_values=torch.empty(rows, 1) if full else None,
        mask=flags(token, full),
        gamma=gamma,
        gae_lambda=1.0,
        mask_mode=mask_mode,
        starts_at_t=False,
    )
    arguments = VtraceArguments(
        gae=gae._replace(returns=None),
        logprobs=token,
        old_logprobs=token,
        rho_max=float("inf"),
        c_max=float("inf"),
        pg_rho_max=float("inf"),
        log_ratio_limit=20.0,
        weighs_advantages=False,
    )
    _triton.vtrace(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout, steps in (("dense time", 2000), ("packed", 50)):
        yield (
            f"{layout} {steps} mask",
            partial(off_policy_returns, 64, steps, layout, True, COMPACT),
        )
    if all_of_them:
        yield "dense time 100", partial(off_policy_returns, 64, 100, "dense time", False, CARRY)


def variations() -> Iterator[Callable[[], None]]:
    for rows in (1, 2, 16):
        yield partial(off_policy_returns, rows, 2000 + rows, "dense time", True, COMPACT, 1 / rows)
        yield partial(off_policy_returns, rows + 1, 17, "packed", True, COMPACT)
