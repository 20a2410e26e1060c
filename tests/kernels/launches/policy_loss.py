"""Launches of the Triton kernels of policy_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def policy_loss(
    dtype: torch.dtype, packed: bool, sequence: bool, mean: bool, kl: int,
    rows: int = 4, steps: int = 100, clip: float = 0.2,
) -> None:  # fmt: skip
    from warpo.kernels import _triton

    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    ref = token if kl else None
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    scalar, gradient = torch.empty(()), torch.empty(rows, steps)
    _triton.policy_loss(
        rows, steps, cu_seqlens, token, token, token, ref, flags(token, mean), sequence, mean,
        1 - clip, 1 + clip, kl, clip / 2, 100 * clip, scalar, gradient,
        torch.empty(rows, 10), scalar, torch.empty(10),
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    for sequence in (False, True):
        for kl in range(4) if all_of_them else (3,):
            dtype, packed, mean = (torch.bfloat16, torch.float32)[kl % 2], kl % 2 == 1, kl >= 2
            label = f"{'sequence' if sequence else 'token'} k{kl}{' mean mask' if mean else ''}"
            yield label, partial(policy_loss, dtype, packed, sequence, mean, kl)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37)):
        clip = 1 / (rows + 1)
        yield partial(policy_loss, torch.bfloat16, False, False, True, 2, rows, steps, clip=clip)
        yield partial(policy_loss, torch.float32, True, True, True, 3, rows, steps, clip=0.0)
