"""Launches of the Triton kernels of reward_model_loss and ranking_loss, for test_triton_compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tests.kernels.launches import flags

Launch = tuple[str, Callable[[], None]]


def reward_model_loss(dtype: torch.dtype, margins: bool, mask: bool, pairs: int = 9) -> None:
    from warpo.kernels import _triton

    scores, scalar, grad = torch.empty(pairs, dtype=dtype), torch.empty(()), torch.empty(pairs)
    _triton.reward_model_loss(
        pairs, scores, scores, scores if margins else None, flags(scores, mask), 1 / pairs, scalar,
        grad, grad, torch.empty(-(-pairs // 256), 7), scalar, torch.empty(7),
    )  # fmt: skip


def ranking_loss(dtype: torch.dtype, mask: bool, groups: int = 4) -> None:
    from warpo.kernels import _triton

    scores, scalar = torch.empty(4 * groups, dtype=dtype), torch.empty(())
    _triton.ranking_loss(
        groups, 4 * groups, scores, torch.empty(4 * groups, dtype=torch.int64), flags(scores, mask),
        torch.zeros(groups + 1, dtype=torch.int32), 1 / groups, scalar, torch.empty(4 * groups),
        torch.empty(groups, 7), scalar, torch.empty(7),
    )  # fmt: skip


def configurations(all_of_them: bool) -> Iterator[Launch]:
    yield "margins mask", partial(reward_model_loss, torch.bfloat16, True, True)
    yield "mask", partial(ranking_loss, torch.bfloat16, True)
    if all_of_them:
        yield "plain", partial(reward_model_loss, torch.float32, False, False)
        yield "plain", partial(ranking_loss, torch.float32, False)


def variations() -> Iterator[Callable[[], None]]:
    for number in (1, 2, 16, 300):
        yield partial(reward_model_loss, torch.bfloat16, True, True, number)
        yield partial(ranking_loss, torch.float32, False, number)
