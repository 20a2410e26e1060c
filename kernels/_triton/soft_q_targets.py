"""Targets of soft Q-functions, a program a block of transitions.

The formula is that of `csrc/math/soft_q_targets.h`.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.soft_q_targets import SoftQTargetsArguments
from warpo.kernels._triton.launch import kernel

BLOCK = 256
WARPS = 4


@kernel()
def _soft_q_targets_kernel(
    count: tl.int64,
    rewards_ptr,
    rewards_stride: tl.int64,
    terminated_ptr,
    terminated_stride: tl.int64,
    next_q1_ptr,
    next_q1_stride: tl.int64,
    next_q2_ptr,
    next_q2_stride: tl.int64,
    next_logprobs_ptr,
    next_logprobs_stride: tl.int64,
    alpha_ptr,
    gamma: tl.float32,
    targets_ptr,
    BLOCK: tl.constexpr,
):
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


def soft_q_targets(a: SoftQTargetsArguments) -> None:
    if a.transitions == 0:
        return
    views = (a.rewards, a.terminated, a.next_q1, a.next_q2, a.next_logprobs)
    with torch.cuda.device_of(a.rewards):
        _soft_q_targets_kernel[(triton.cdiv(a.transitions, BLOCK),)](
            a.transitions,
            *(part for x in views for part in (x, x.stride(0))),
            a.alpha,
            float(a.gamma),
            a.targets,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
