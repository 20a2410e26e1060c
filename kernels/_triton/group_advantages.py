"""Group-relative advantages: one program a group, which walks its members in blocks."""

import torch
import triton
import triton.language as tl

from warpo.kernels._arguments.group_advantages import (
    GroupAdvantagesArguments,
    GroupAdvantagesBackwardArguments,
)
from warpo.kernels._triton.launch import column, kernel

BLOCK = 128
WARPS = 1

POPULATION_STD, LEAVE_ONE_OUT_STD = tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _bounds(group, group_size, offsets_ptr):
    """First member and number of members of a group."""
    if offsets_ptr is None:
        start = group * group_size
        count = group_size
    else:
        start = tl.load(offsets_ptr + group)
        count = tl.load(offsets_ptr + group + 1) - start
    return start, count


@triton.jit
def _members(order_ptr, start, block, count, BLOCK: tl.constexpr):
    """Indices of a block of members, and which of them exist."""
    member = block + tl.arange(0, BLOCK)
    inside = member < count
    index = start + member
    if order_ptr is not None:
        index = tl.load(order_ptr + index, mask=inside, other=0)
    return index, inside


@triton.jit
def _load(ptr, stride, index, inside):
    return tl.load(ptr + index * stride, mask=inside, other=0).to(tl.float32)


@triton.jit
def _centre(
    rewards_ptr,
    rewards_stride,
    lengths_ptr,
    lengths_stride,
    order_ptr,
    start,
    count,
    BLOCK: tl.constexpr,
):
    """`Centre` of csrc/cuda/group_advantages.cu: the first reward; offsets from it of the mean and
    of what the rewards are compared with; the sum of lengths; whether all rewards are equal.
    """
    head, any_member = _members(order_ptr, start, 0, tl.minimum(count, 1), 1)
    # of no members 0, which the mean then is
    first = tl.sum(_load(rewards_ptr, rewards_stride, head, any_member))
    total = tl.zeros([BLOCK], tl.float32)
    weighted, lengths = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    # counted rather than max - min: NaN differs from all, itself too
    different = tl.zeros([BLOCK], tl.int32)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        offset = tl.where(inside, reward - first, 0.0)
        total += offset
        different += (inside & (reward != first)).to(tl.int32)
        if lengths_ptr is not None:
            length = _load(lengths_ptr, lengths_stride, index, inside)
            lengths += length
            weighted += length * offset
    all_equal = tl.sum(different) == 0
    size = tl.maximum(count, 1).to(tl.float32)
    mean_offset = tl.where(all_equal, 0.0, tl.sum(total) / size)
    sum_length = tl.sum(lengths)
    baseline_offset = mean_offset
    if lengths_ptr is not None:
        baseline_offset = tl.sum(weighted) / sum_length
    return first, mean_offset, baseline_offset, sum_length, all_equal


@triton.jit
def _moments(rewards_ptr, rewards_stride, order_ptr, start, count, BLOCK: tl.constexpr):
    """`GroupMoments` of csrc/math/group_advantages.h."""
    total = tl.zeros([BLOCK], tl.float64)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    largest = -smallest
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        total += reward
        smallest = tl.where(inside & (reward < smallest), reward, smallest)
        largest = tl.where(inside & (reward > largest), reward, largest)
    low, high = tl.min(smallest), tl.max(largest)
    mean = tl.sum(total) / tl.maximum(count, 1).to(tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    num_low, num_high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        centred = tl.where(inside, reward - mean, 0.0)
        squares += centred * centred
        num_low += (inside & (reward == low)).to(tl.int32)
        num_high += (inside & (reward == high)).to(tl.int32)
    return count, mean, tl.sum(squares), low, high, tl.sum(num_low), tl.sum(num_high)


@triton.jit
def _others_terms(moments, reward, grad, eps, LEAVE_ONE_OUT: tl.constexpr):
    """`others_terms` of csrc/math/group_advantages.h: centred reward, advantage, q and p."""
    count, mean, squares, low, high, num_low, num_high = moments
    # blocks: the interpreter takes no logical operation of a block and a scalar
    zeros = tl.zeros(reward.shape, tl.int64)
    count, num_low, num_high = count + zeros, num_low + zeros, num_high + zeros
    alone = ((reward == low) & (num_low == 1)) | ((reward == high) & (num_high == 1))
    none = (count < 3) | (alone & (num_low + num_high == count))
    size = count.to(tl.float64)
    centred = reward.to(tl.float64) - mean
    ratio = size / tl.maximum(size - 1.0, 1.0)
    rest = squares - ratio * centred * centred
    none |= rest <= 0
    std = tl.sqrt(tl.where(none, 1.0, rest / tl.maximum(size - 2.0, 1.0)))
    factor = ratio if LEAVE_ONE_OUT else 1.0
    scale = tl.where(none, factor, factor / (std + eps))
    advantage = scale * centred
    p = grad * advantage / ((std + eps) * std * tl.maximum(size - 2.0, 1.0))
    return centred, advantage, grad * scale, tl.where(none, 0.0, p)


@triton.jit
def _forward_others(
    rewards_ptr,
    rewards_stride,
    order_ptr,
    start,
    count,
    eps,
    advantages_ptr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    moments = _moments(rewards_ptr, rewards_stride, order_ptr, start, count, BLOCK)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        _, advantage, _, _ = _others_terms(moments, reward, 0.0, eps, LEAVE_ONE_OUT)
        tl.store(advantages_ptr + index, advantage.to(tl.float32), mask=inside)


@triton.jit
def _backward_others(
    rewards_ptr,
    rewards_stride,
    order_ptr,
    start,
    count,
    eps,
    grad_advantages_ptr,
    grad_advantages_stride,
    grad_rewards_ptr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    moments = _moments(rewards_ptr, rewards_stride, order_ptr, start, count, BLOCK)
    size = count.to(tl.float64)
    q_sum, p_sum = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    pc_sum = tl.zeros([BLOCK], tl.float64)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        grad = _load(grad_advantages_ptr, grad_advantages_stride, index, inside)
        centred, _, q, p = _others_terms(moments, reward, grad, eps, LEAVE_ONE_OUT)
        q_sum += tl.where(inside, q, 0.0)
        p_sum += tl.where(inside, p, 0.0)
        pc_sum += tl.where(inside, p * centred, 0.0)
    q_mean, p_all, pc_mean = tl.sum(q_sum) / size, tl.sum(p_sum), tl.sum(pc_sum) / size
    ratio = size / tl.maximum(size - 1.0, 1.0)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        grad = _load(grad_advantages_ptr, grad_advantages_stride, index, inside)
        centred, _, q, p = _others_terms(moments, reward, grad, eps, LEAVE_ONE_OUT)
        result = q - q_mean - centred * p_all + ratio * (p * centred - pc_mean)
        tl.store(grad_rewards_ptr + index, result.to(tl.float32), mask=inside)


@kernel()
def _group_advantages_fwd_kernel(
    rewards_ptr,
    rewards_stride: tl.int64,
    lengths_ptr,
    lengths_stride: tl.int64,
    group_size: tl.int64,
    order_ptr,
    offsets_ptr,
    eps: tl.float32,
    advantages_ptr,
    mean_ptr,
    std_ptr,
    degenerate_ptr,
    STD: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start, count = _bounds(group, group_size, offsets_ptr)
    first, mean_offset, baseline_offset, _, all_equal = _centre(
        rewards_ptr,
        rewards_stride,
        lengths_ptr,
        lengths_stride,
        order_ptr,
        start,
        count,
        BLOCK,
    )
    size = tl.maximum(count, 1).to(tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    if STD != 0:
        for block in range(0, count, BLOCK):
            index, inside = _members(order_ptr, start, block, count, BLOCK)
            reward = _load(rewards_ptr, rewards_stride, index, inside)
            centred = tl.where(inside, (reward - first) - mean_offset, 0.0)
            squares += centred * centred
    freedom = size if STD == POPULATION_STD else tl.maximum(size - 1.0, 1.0)
    std = tl.where(all_equal, 0.0, tl.sqrt_rn(tl.sum(squares) / freedom))

    tl.store(mean_ptr + group, first + mean_offset)
    tl.store(std_ptr + group, std)
    tl.atomic_add(degenerate_ptr, 1, mask=all_equal & (count > 0))
    if STD == LEAVE_ONE_OUT_STD:  # noqa: SIM102  (the outer one is decided at compile time)
        if not all_equal:
            _forward_others(
                rewards_ptr,
                rewards_stride,
                order_ptr,
                start,
                count,
                eps,
                advantages_ptr,
                LEAVE_ONE_OUT,
                BLOCK,
            )
            return
    scale = 1.0 / (std + eps) if STD != 0 else 1.0
    if LEAVE_ONE_OUT:
        scale *= size / tl.maximum(size - 1.0, 1.0)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        advantage = tl.where(all_equal, 0.0, ((reward - first) - baseline_offset) * scale)
        tl.store(advantages_ptr + index, advantage, mask=inside)


@kernel()
def _group_advantages_bwd_kernel(
    rewards_ptr,
    rewards_stride: tl.int64,
    lengths_ptr,
    lengths_stride: tl.int64,
    group_size: tl.int64,
    order_ptr,
    offsets_ptr,
    eps: tl.float32,
    std_ptr,
    grad_advantages_ptr,
    grad_advantages_stride: tl.int64,
    grad_rewards_ptr,
    STD: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start, count = _bounds(group, group_size, offsets_ptr)
    std = tl.load(std_ptr + group)
    first, mean_offset, baseline_offset, sum_length, all_equal = _centre(
        rewards_ptr,
        rewards_stride,
        lengths_ptr,
        lengths_stride,
        order_ptr,
        start,
        count,
        BLOCK,
    )
    total = tl.zeros([BLOCK], tl.float32)
    projection = tl.zeros([BLOCK], tl.float32)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        reward = _load(rewards_ptr, rewards_stride, index, inside)
        grad = _load(grad_advantages_ptr, grad_advantages_stride, index, inside)
        total += grad
        projection += tl.where(inside, grad * ((reward - first) - baseline_offset), 0.0)
    size = tl.maximum(count, 1).to(tl.float32)
    mean_grad = tl.sum(total) / size
    if STD == LEAVE_ONE_OUT_STD:  # noqa: SIM102  (the outer one is decided at compile time)
        if not all_equal:
            _backward_others(
                rewards_ptr,
                rewards_stride,
                order_ptr,
                start,
                count,
                eps,
                grad_advantages_ptr,
                grad_advantages_stride,
                grad_rewards_ptr,
                LEAVE_ONE_OUT,
                BLOCK,
            )
            return

    # d std / d r_i = (r_i - mean) / (freedom std)
    scale, slope = 1.0, 0.0
    if STD != 0:
        freedom = size if STD == POPULATION_STD else tl.maximum(size - 1.0, 1.0)
        scale = 1.0 / (std + eps)
        slope = tl.where(std == 0, 0.0, tl.sum(projection) * scale / (freedom * std))
    if LEAVE_ONE_OUT:
        scale *= size / tl.maximum(size - 1.0, 1.0)
    for block in range(0, count, BLOCK):
        index, inside = _members(order_ptr, start, block, count, BLOCK)
        grad = _load(grad_advantages_ptr, grad_advantages_stride, index, inside)
        if lengths_ptr is not None:
            length = _load(lengths_ptr, lengths_stride, index, inside)
            result = grad - length / sum_length * tl.sum(total)
        else:
            result = grad - mean_grad
        if STD != 0:
            reward = _load(rewards_ptr, rewards_stride, index, inside)
            result -= slope * ((reward - first) - mean_offset)
        tl.store(grad_rewards_ptr + index, tl.where(all_equal, 0.0, scale * result), mask=inside)


def group_advantages_forward(a: GroupAdvantagesArguments) -> None:
    if a.groups == 0:
        return
    with torch.cuda.device_of(a.rewards):
        _group_advantages_fwd_kernel[(a.groups,)](
            a.rewards,
            a.rewards.stride(0),
            *column(a.lengths),
            a.group_size,
            a.order,
            a.offsets,
            float(a.eps),
            a.advantages,
            a.mean,
            a.std,
            a.degenerate,
            STD=a.std_mode,
            LEAVE_ONE_OUT=a.leave_one_out,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def group_advantages_backward(a: GroupAdvantagesBackwardArguments) -> None:
    f = a.forward
    if f.groups == 0:
        return
    with torch.cuda.device_of(f.rewards):
        _group_advantages_bwd_kernel[(f.groups,)](
            f.rewards,
            f.rewards.stride(0),
            *column(f.lengths),
            f.group_size,
            f.order,
            f.offsets,
            float(f.eps),
            f.std,
            a.grad_advantages,
            a.grad_advantages.stride(0),
            a.grad_rewards,
            STD=f.std_mode,
            LEAVE_ONE_OUT=f.leave_one_out,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
