"""Launches of the Triton kernels of adamw_publish, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

Launch = tuple[str, Callable[[], None]]


def adamw_publish(
    grad: torch.dtype, published: torch.dtype, on_device: bool, rows: int = 3, columns: int = 100,
    master: bool = True, moments: torch.dtype = torch.float32, stochastic: bool = False,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    state = torch.empty(rows * columns)
    moment = state.to(moments)
    _triton.adamw_publish(
        rows, columns, state.to(grad), state if master else None, moment, moment,
        torch.empty(rows, columns, dtype=published), *(1 / columns,) * 8,
        torch.empty(()) if on_device else None, stochastic, columns, rows,
        torch.empty(1024, 2, dtype=torch.int64), torch.empty(1024, 2),
        torch.empty(2, dtype=torch.int64), torch.empty(2),
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    bf16 = torch.bfloat16
    yield "bf16", partial(adamw_publish, bf16, bf16, True)
    if all_of_them:
        yield "f32 f16", partial(adamw_publish, torch.float32, torch.float16, False)
        yield "bf16 f32", partial(adamw_publish, bf16, torch.float32, False)
        yield (
            "bf16 own",
            partial(
                adamw_publish,
                bf16,
                bf16,
                False,
                rows=1,
                master=False,
                moments=bf16,
                stochastic=True,
            ),
        )
        yield "f32 own", partial(adamw_publish, torch.float32, torch.float32, True, master=False)


def variations() -> Iterator[Callable[[], None]]:
    for rows, columns in ((1, 1), (1, 4096), (16, 37)):
        yield partial(adamw_publish, torch.bfloat16, torch.bfloat16, True, rows, columns)
