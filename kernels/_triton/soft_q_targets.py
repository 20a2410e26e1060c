"""Targets of soft Q-functions, a program a block of transitions.

The formula is that of `csrc/math/soft_q_targets.h`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from warpo.kernels._triton.launch import kernel

BLOCK = 256
WARPS = 4


@kernel()
def _soft_q_targets_kernel(
    count: tl.int64, rewards_ptr, rewards_stride: tl.int64,
    terminated_ptr, terminated_stride: tl.int64,
    next_q1_ptr, next_q1_stride: tl.int64, next_q2_ptr, next_q2_stride: tl.int64,
    next_logprobs_ptr, next_logprobs_stride: tl.int64,
    alpha_ptr, gamma: tl.float32, targets_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    reward = tl.load(rewards_ptr + index * rewards_stride, mask=inside, other=0).to(tl.float32)
    ends = tl.load(terminated_ptr + index * terminated_stride, mask=inside, other=1) != 0
    goes_on = ~ends
    q1 = tl.load(next_q1_ptr + index * next_q1_stride, mask=goes_on, other=0).to(tl.float32)
    q2 = tl.load(next_q2_ptr + index * next_q2_stride, mask=goes_on, other=0).to(tl.float32)
    pointers = next_logprobs_ptr + index * next_logprobs_stride
    logprob = tl.load(pointers, mask=goes_on, other=0).to(tl.float32)
    # NaN where either is
    smaller = tl.where(q1 <= q2, q1, tl.where(q2 < q1, q2, q1 + q2))
    target = reward + gamma * (smaller - tl.load(alpha_ptr) * logprob)
    tl.store(targets_ptr + index, tl.where(ends, reward, target), mask=inside)


def soft_q_targets(
    count: int,
    rewards: Tensor,
    terminated: Tensor,
    next_q1: Tensor,
    next_q2: Tensor,
    next_logprobs: Tensor,
    alpha: Tensor,
    gamma: float,
    targets: Tensor,
) -> None:
    """The fields of `SoftQTargets`."""
    if count == 0:
        return
    views = (rewards, terminated, next_q1, next_q2, next_logprobs)
    with torch.cuda.device_of(rewards):
        _soft_q_targets_kernel[(triton.cdiv(count, BLOCK),)](
            count, *(part for x in views for part in (x, x.stride(0))), alpha, float(gamma),
            targets, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
