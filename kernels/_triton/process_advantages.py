"""Advantages from rewards of steps: one program an output, which computes the statistics of its
group anew, in an order that is the same for all outputs of the group.
"""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.process_advantages import ProcessAdvantagesArguments
from warpo.kernels._triton.launch import kernel
from warpo.kernels._triton.offsets import extent

BLOCK_OUTPUTS = 8
BLOCK_STEPS = 32
BLOCK_TOKENS = 128
WARPS = 4

SAMPLE_STD = tl.constexpr(1)


@triton.jit
def _members(
    first, last, order_ptr, step_offsets_ptr, step_offsets_stride, steps, BLOCK: tl.constexpr
):
    """First step and number of steps of some outputs of a group, and whether they are malformed."""
    member = first + tl.arange(0, BLOCK)
    exists = member < last
    output = member
    if order_ptr is not None:
        output = tl.load(order_ptr + member, mask=exists, other=0)
    start, end, malformed = extent(
        step_offsets_ptr, step_offsets_stride, tl.num_programs(0), output, steps, exists
    )
    return start, end - start, malformed


@triton.jit
def _load_steps(rewards_ptr, rewards_stride, start, count, block, BLOCK: tl.constexpr):
    """Rewards [outputs, steps] of a block of steps of each output, and which of them exist."""
    step = block + tl.arange(0, BLOCK)[None, :]
    inside = step < count[:, None]
    pointers = rewards_ptr + (start[:, None] + step) * rewards_stride
    return tl.load(pointers, mask=inside, other=0).to(tl.float32), inside


@triton.jit
def _statistics(
    first,
    last,
    order_ptr,
    step_offsets_ptr,
    step_offsets_stride,
    steps,
    rewards_ptr,
    rewards_stride,
    eps,
    STD: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
):
    """Mean, std, scale (0 if all are equal) and number of the rewards of a group; NaN where the
    steps of a member are malformed.
    """
    number = tl.full([], 0.0, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    smallest = tl.full([], float("inf"), tl.float32)
    largest = -smallest
    for outputs in range(first, last, BLOCK_OUTPUTS):
        start, count, malformed = _members(
            outputs, last, order_ptr, step_offsets_ptr, step_offsets_stride, steps, BLOCK_OUTPUTS
        )
        poison = tl.max(malformed.to(tl.int32)) > 0
        number += tl.where(poison, 1.0, 0.0)
        total = tl.where(poison, float("nan"), total)
        for block in range(0, tl.max(count), BLOCK_STEPS):
            reward, inside = _load_steps(
                rewards_ptr, rewards_stride, start, count, block, BLOCK_STEPS
            )
            number += tl.sum(tl.sum(inside.to(tl.float32), 1))
            total += tl.sum(tl.sum(reward, 1))
            smallest = tl.minimum(smallest, tl.min(tl.min(tl.where(inside, reward, smallest), 1)))
            largest = tl.maximum(largest, tl.max(tl.max(tl.where(inside, reward, largest), 1)))
    # a NaN is in the total, whatever the extremes make of it
    all_equal = (number == 0) | ((smallest == largest) & (total == total))
    mean = tl.where(
        number == 0, 0.0, tl.where(all_equal, smallest, total / tl.maximum(number, 1.0))
    )
    squares = tl.full([], 0.0, tl.float32)
    if STD != 0:
        for outputs in range(first, last, BLOCK_OUTPUTS):
            start, count, _ = _members(
                outputs,
                last,
                order_ptr,
                step_offsets_ptr,
                step_offsets_stride,
                steps,
                BLOCK_OUTPUTS,
            )
            for block in range(0, tl.max(count), BLOCK_STEPS):
                reward, inside = _load_steps(
                    rewards_ptr, rewards_stride, start, count, block, BLOCK_STEPS
                )
                centred = tl.where(inside, reward - mean, 0.0)
                squares += tl.sum(tl.sum(centred * centred, 1))
    freedom = number - 1.0 if STD == SAMPLE_STD else number
    # the total too: of a malformed member without steps nothing else tells
    std = tl.sqrt_rn((squares + 0.0 * total) / tl.maximum(freedom, 1.0))
    std = tl.where(all_equal, 0.0, std)
    scale = 1.0 / (std + eps) if STD != 0 else 1.0
    return mean, std, tl.where(all_equal, 0.0, scale), number


@triton.jit
def _has_malformed_end(ends_ptr, ends_stride, start, count, length, BLOCK: tl.constexpr):
    """Whether a step ends outside its output or before the step before it."""
    found = tl.zeros([BLOCK], tl.int32)
    for block in range(0, count, BLOCK):
        step = block + tl.arange(0, BLOCK)
        inside = step < count
        pointers = ends_ptr + (start + step) * ends_stride
        end = tl.load(pointers, mask=inside, other=0)
        before = tl.load(pointers - ends_stride, mask=inside & (step > 0), other=0)
        found |= (inside & ((end < before) | (end < 0) | (end >= length))).to(tl.int32)
    return tl.max(found) > 0


@kernel()
def _process_advantages_kernel(
    groups: tl.int64,
    steps: tl.int64,
    tokens: tl.int64,
    cu_seqlens_ptr,
    rewards_ptr,
    rewards_stride: tl.int64,
    step_offsets_ptr,
    step_offsets_stride: tl.int64,
    ends_ptr,
    ends_stride: tl.int64,
    group_size: tl.int64,
    group_ids_ptr,
    order_ptr,
    offsets_ptr,
    eps: tl.float32,
    advantages_ptr,
    mean_ptr,
    std_ptr,
    degenerate_ptr,
    STD: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    output = tl.program_id(0).to(tl.int64)
    if group_ids_ptr is None:
        group = output // group_size
        first = group * group_size
        last = first + group_size
        leader = first
    else:
        group = tl.load(group_ids_ptr + output)
        exists = (group >= 0) & (group < groups)
        first = tl.load(offsets_ptr + group, mask=exists, other=0)
        last = tl.load(offsets_ptr + group + 1, mask=exists, other=0)
        leader = tl.load(order_ptr + first, mask=exists, other=-1)
    mean, std, scale, number = _statistics(
        first,
        last,
        order_ptr,
        step_offsets_ptr,
        step_offsets_stride,
        steps,
        rewards_ptr,
        rewards_stride,
        eps,
        STD,
        BLOCK_OUTPUTS,
        BLOCK_STEPS,
    )
    is_leader = leader == output
    tl.store(mean_ptr + group, mean, mask=is_leader)
    tl.store(std_ptr + group, std, mask=is_leader)
    tl.atomic_add(degenerate_ptr, 1, mask=is_leader & (scale == 0) & (number > 0))

    outputs = tl.num_programs(0)
    start, stop, malformed = extent(
        step_offsets_ptr, step_offsets_stride, outputs, output, steps, output < outputs
    )
    count = stop - start
    if cu_seqlens_ptr is None:
        row = output * tokens
        length = tokens
    else:
        row, row_end, row_malformed = extent(
            cu_seqlens_ptr, 1, outputs, output, tokens, output < outputs
        )
        length = row_end - row
        malformed |= row_malformed
    malformed |= _has_malformed_end(ends_ptr, ends_stride, start, count, length, BLOCK_STEPS)
    for first_token in range(0, length, BLOCK_TOKENS):
        token = first_token + tl.arange(0, BLOCK_TOKENS)
        advantage = tl.zeros([BLOCK_TOKENS], tl.float32)
        for block in range(0, count, BLOCK_STEPS):
            step = block + tl.arange(0, BLOCK_STEPS)
            inside = step < count
            index = start + step
            reward = tl.load(rewards_ptr + index * rewards_stride, mask=inside, other=0)
            end = tl.load(ends_ptr + index * ends_stride, mask=inside, other=-1)
            normalised = tl.where(scale == 0, 0.0, (reward.to(tl.float32) - mean) * scale)
            counts = inside[None, :] & (end[None, :] >= token[:, None])
            advantage += tl.sum(tl.where(counts, normalised[None, :], 0.0), 1)
        advantage = tl.where(malformed, float("nan"), advantage)
        tl.store(advantages_ptr + row + token, advantage, mask=token < length)


def process_advantages(a: ProcessAdvantagesArguments) -> None:
    with torch.cuda.device_of(a.step_rewards):
        _process_advantages_kernel[(a.outputs,)](
            a.groups,
            a.steps,
            a.tokens,
            a.cu_seqlens,
            a.step_rewards,
            a.step_rewards.stride(0),
            a.step_offsets,
            a.step_offsets.stride(0),
            a.step_ends,
            a.step_ends.stride(0),
            a.group_size,
            a.group_ids,
            a.order,
            a.offsets,
            float(a.eps),
            a.advantages,
            a.mean,
            a.std,
            a.degenerate,
            STD=a.std_mode,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            BLOCK_STEPS=BLOCK_STEPS,
            BLOCK_TOKENS=BLOCK_TOKENS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
