"""Launches of the Triton kernels of adamw_publish, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.kernels._arguments.adamw_publish import AdamwPublishArguments, AdamwTensorArguments

Launch = tuple[str, Callable[[], None]]


def adamw_publish(
    grad: torch.dtype,
    published: torch.dtype,
    on_device: bool,
    rows: int = 3,
    columns: int = 100,
    *,
    master: bool = True,
    moments: torch.dtype = torch.float32,
    stochastic: bool = False,
) -> None:
    from warpo.kernels import _triton

    state, number = torch.empty(rows * columns), 1 / columns
    moment = state.to(moments)
    tensor = AdamwTensorArguments(
        published=torch.empty(rows, columns, dtype=published),
        grad=state.to(grad),
        master=state if master else None,
        exp_avg=moment,
        exp_avg_sq=moment,
        step_size=number,
        root_scale=number,
        seed=columns,
        step=rows,
    )
    arguments = AdamwPublishArguments(
        tensors=[tensor, tensor],
        decay=number,
        grad_weight=number,
        beta2=number,
        square_weight=number,
        eps=number,
        grad_scale=number,
        grad_scale_factor=torch.empty(()) if on_device else None,
        stochastic=stochastic,
        partial_counts=torch.empty(2048, 2, dtype=torch.int64),
        partial_updates=torch.empty(2048, 2),
        counts=torch.empty(2, 2, dtype=torch.int64),
        updates=torch.empty(2, 2),
    )
    _triton.adamw_publish(arguments)


def configurations(all_of_them: bool) -> Iterator[Launch]:
    bf16 = torch.bfloat16
    yield "bf16", partial(adamw_publish, bf16, bf16, True)
    if all_of_them:
        yield "f32 f16", partial(adamw_publish, torch.float32, torch.float16, False)
        yield "bf16 f32", partial(adamw_publish, bf16, torch.float32, False)
        own = {"rows": 1, "master": False, "moments": bf16, "stochastic": True}
        yield "bf16 own", partial(adamw_publish, bf16, bf16, False, **own)
        yield "f32 own", partial(adamw_publish, torch.float32, torch.float32, True, master=False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (1, 4096), (16, 37)):
        yield partial(adamw_publish, torch.bfloat16, torch.bfloat16, True, rows, columns)
