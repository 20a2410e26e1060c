"""Launches of the Triton kernels of policy_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]

TOKEN, SEQUENCE, PREFIX = range(3)
CLIP, DUAL_CLIP, STOP_GRADIENT, MASK, NONE, REINFORCE, GEOMETRIC, SOFT_GATE = range(8)


def policy_loss(
    dtype: torch.dtype, packed: bool, mean: bool, level: int, surrogate: int, kl: int,
    correction: int = 0, correction_sequence: bool = False, extras: bool = False,
    rows: int = 4, steps: int = 100, clip: float = 0.2,
) -> None:  # fmt: skip
    """extras: entropy and its gradient, a coefficient on the device, straight-through."""
    from warpo.kernels import _triton

    token = torch.empty(1, steps, dtype=dtype).expand(rows, steps)
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32) if packed else None
    scalar, gradient = torch.empty(()), torch.empty(rows, steps)
    _triton.policy_loss(
        rows, steps, cu_seqlens, token, token, token, token if kl else None,
        token if correction else None, token if extras else None, flags(token, mean),
        level, surrogate, 1 - clip, 1 + clip, 3 + clip, 1 + clip, 1 + clip / 2,
        correction, correction_sequence, clip, 2 + clip,
        kl, extras, clip / 2, scalar if extras else None, clip, 20 * clip, mean, scalar,
        gradient, gradient if extras else None, torch.empty(max(rows, 512), 15), scalar,
        torch.empty(15),
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    f32, bf16 = torch.float32, torch.bfloat16
    cases = {
        "token clip k3": (bf16, False, False, TOKEN, CLIP, 3),
        "sequence geometric k3 sequence mask all": (
            f32, True, True, SEQUENCE, GEOMETRIC, 3, 2, True, True,
        ),
    }  # fmt: skip
    if all_of_them:
        cases |= {
            "token dual clip k1 mean mask": (f32, True, True, TOKEN, DUAL_CLIP, 1),
            "token mask k2 truncate all": (bf16, False, True, TOKEN, MASK, 2, 1, False, True),
            "token clip mask nan": (f32, False, False, TOKEN, CLIP, 0, 4),
            "token none packed": (bf16, True, False, TOKEN, NONE, 0),
            "token reinforce": (f32, False, False, TOKEN, REINFORCE, 0),
            "token soft gate sequence truncate": (
                f32, False, True, TOKEN, SOFT_GATE, 0, 1, True,
            ),
            "sequence clip k2": (bf16, False, False, SEQUENCE, CLIP, 2),
            "sequence dual clip mask all": (
                f32, True, False, SEQUENCE, DUAL_CLIP, 3, 2, False, True,
            ),
            "sequence stop gradient": (f32, False, True, SEQUENCE, STOP_GRADIENT, 0),
            "sequence soft gate k1": (bf16, True, True, SEQUENCE, SOFT_GATE, 1),
            "prefix stop gradient k3 truncate all": (
                bf16, True, True, PREFIX, STOP_GRADIENT, 3, 1, False, True,
            ),
        }  # fmt: skip
    for label, case in cases.items():
        yield label, partial(policy_loss, *case)


def variations() -> Iterator[Callable[[], None]]:
    for rows, steps in ((1, 1), (2, 128), (16, 37), (600, 3000)):
        sizes = {"rows": rows, "steps": steps, "clip": 1 / (rows + 1)}
        yield partial(policy_loss, torch.bfloat16, False, False, TOKEN, CLIP, 3, **sizes)
        yield partial(policy_loss, torch.float32, True, True, TOKEN, DUAL_CLIP, 1, **sizes)
        yield partial(policy_loss, torch.bfloat16, False, False, SEQUENCE, CLIP, 2, **sizes)
