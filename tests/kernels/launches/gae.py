"""Launches of the Triton kernels of gae, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.kernels.launches import flags
from warpo.kernels._arguments.gae import GaeArguments, GaeBackwardArguments, ScanArguments

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


def gae_arguments(
    rows: int, steps: int, cu_seqlens: Tensor | None, token: Tensor, **others: Any
) -> GaeArguments:
    """With advantages and returns; whatever else is not among the others is absent."""
    given = dict.fromkeys((*ScanArguments._fields, *GaeArguments._fields)) | others
    given |= {"rows": rows, "steps": steps, "cu_seqlens": cu_seqlens}
    given |= {"advantages": token, "returns": token}
    scan = ScanArguments(**{name: given.pop(name) for name in ScanArguments._fields})
    return GaeArguments(**given | {"scan": scan})


def gae(
    rows: int,
    steps: int,
    layout: str,
    full: bool,
    starts_at_t: bool = False,
    mask_mode: int = CARRY,
    gamma: float = 0.99,
) -> None:
    from warpo.kernels import _triton

    steps, token, cu_seqlens = per_step(rows, steps, layout)
    last = torch.empty(rows, 1)
    last_flag = flags(last, full and starts_at_t)
    forward = gae_arguments(
        rows,
        steps,
        cu_seqlens,
        token,
        rewards=token,
        values=token,
        last_values=last,
        final_values=token if full else None,
        mask=flags(token, full),
        terminated=flags(token, full),
        truncated=flags(token, full),
        last_terminated=last_flag,
        last_truncated=last_flag,
        gamma=gamma,
        gae_lambda=0.95,
        mask_mode=mask_mode,
        starts_at_t=starts_at_t,
    )
    _triton.gae_forward(forward)
    backward = GaeBackwardArguments(
        forward=forward,
        grad_advantages=token,
        grad_returns=token,
        grad_rewards=token,
        grad_values=token,
        grad_last_values=last,
        grad_final_values=forward.final_values,
    )
    _triton.gae_backward(backward)


LAYOUTS = (
    ("dense time", 10),
    ("dense time", 100),
    ("dense time", 2000),
    ("dense rows", 50),
    ("packed", 50),
)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for layout, steps in LAYOUTS:
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
