"""Group-relative advantages: mean, standard deviation and advantages of every group in one pass.

    A_i = (r_i - b_i) / (std + eps)

    baseline   mean              b_i = mean
               leave_one_out     b_i = mean_{j != i} r_j;  r_i - b_i = n / (n - 1) (r_i - mean)
               length_weighted   b_i = sum_j |o_j| r_j / sum_j |o_j|

std is that of the group (sample: divided by n - 1; population: by n) or left out. A group whose
rewards are all equal, of one completion too, teaches nothing: A = 0 exactly, std = 0, and it is
counted. The length-weighted baseline is that of the least variance of the gradient if the squared
norm of the gradient of log p(o_j) is in proportion to the length |o_j|.

With std "leave_one_out" each completion is divided by the sample standard deviation of the other n
- 1:

    std_i = sqrt((sum_j (r_j - mean)^2 - n / (n - 1) (r_i - mean)^2) / (n - 2))

0 where the others are all equal or fewer than two; the advantage is then r_i - b_i, not divided: 1
for the only success of a group.

Sources: GRPO, https://arxiv.org/abs/2402.03300 section 4.1.2; without std, Dr. GRPO,
https://arxiv.org/abs/2503.20783; leave-one-out, RLOO, https://arxiv.org/abs/2402.14740 section
2.3; with its std, `use_leave_one_out_baseline` of NeMo RL, https://github.com/NVIDIA-NeMo/RL;
length-weighted, OPO, https://arxiv.org/abs/2505.23585.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.group_advantages import (
    GroupAdvantagesArguments,
    GroupAdvantagesBackwardArguments,
)
from warpo.kernels._checks import FLOATS, check_mask, check_no_grad, check_number, check_tensor
from warpo.kernels._registration import Operator

# in the order of the enumeration in csrc/arguments/group_advantages.h
STD_MODES = ("none", "sample", "population", "leave_one_out")
BASELINES = ("mean", "leave_one_out", "length_weighted")
LENGTHS = (torch.int64, torch.int32, torch.float32)


class GroupAdvantagesInputs(NamedTuple):
    rewards: Tensor
    lengths: Tensor | None
    group_size: int
    num_groups: int
    order: Tensor | None
    offsets: Tensor | None
    std_mode: int
    leave_one_out: bool
    eps: float
    backend: str


class GroupAdvantagesBackwardInputs(NamedTuple):
    rewards: Tensor
    lengths: Tensor | None
    group_size: int
    order: Tensor | None
    offsets: Tensor | None
    std_mode: int
    leave_one_out: bool
    eps: float
    mean: Tensor
    std: Tensor
    grad_advantages: Tensor
    backend: str


class GroupAdvantages(NamedTuple):
    advantages: Tensor
    mean: Tensor
    std: Tensor
    num_degenerate: Tensor


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    mask: Tensor | None = None,
    std: str = "sample",
    baseline: str = "mean",
    lengths: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> GroupAdvantages:
    """Advantage of each completion relative to the other completions to its prompt.

    Args:
        rewards: (B,) float32 | bfloat16 | float16, any stride. Differentiable. A NaN stays in its
            group; to leave it out, mask it.
        group_size: G: group g is rewards[g G : (g + 1) G]. B must be a multiple of it.
        group_ids: (B,) int64 | int32 in [0, num_groups), in any order; instead of group_size. An
            completion with another id, such as -1, belongs to no group, as if masked.
        num_groups: number of groups, with group_ids only. A group without members has mean and std
            0.
        mask: (B,) bool | uint8: the completions that count, such as those whose reward is valid. A
            masked one is never read (it may be NaN), is not counted in n, mean, std and
            num_degenerate, and has advantage and gradient 0.
        std: "sample" | "population" | "leave_one_out" | "none".
        baseline: "mean" | "leave_one_out" | "length_weighted", the last with a std of the group or
            "none".
        lengths: (B,) int64 | int32 | float32, the tokens of each completion, > 0; with
            "length_weighted" only. A group whose lengths add up to 0 has NaN.
        eps: added to the standard deviation.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        advantages: (B,) float32.
        mean, std: (groups,) float32, whatever the baseline; std is 0 where it is "none" or all
            rewards are equal, and the sample std of the group with "leave_one_out".
        num_degenerate: () int32, on the device: groups whose rewards are all equal.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Memory beyond arguments and results: none with group_size alone; 24 bytes per completion with
    group_ids or mask; 4 with lengths that are not float32.
    """
    groups = _check(rewards, group_size, group_ids, num_groups, mask, std, eps)
    _check_baseline(rewards, baseline, lengths, std)
    name = dispatch.choose(rewards, backend)
    if name == "reference":
        ids = groups_of(rewards.numel(), group_size, group_ids, mask, rewards.device)
        return GroupAdvantages(
            *reference.group_advantages(
                rewards.float(),
                ids,
                groups,
                std=std,
                baseline=baseline,
                lengths=None if lengths is None else lengths.float(),
                eps=eps,
            )
        )
    if mask is not None:
        group_ids = groups_of(rewards.numel(), group_size, group_ids, mask, rewards.device)
    order, offsets = (None, None) if group_ids is None else members_of(group_ids, groups)
    inputs = GroupAdvantagesInputs(
        rewards=rewards,
        lengths=None if lengths is None else lengths.float(),
        group_size=group_size or 0,
        num_groups=groups,
        order=order,
        offsets=offsets,
        std_mode=STD_MODES.index(std),
        leave_one_out=baseline == "leave_one_out",
        eps=eps,
        backend=name,
    )
    return GroupAdvantages(*_operator(inputs))


def groups_of(
    number: int,
    group_size: int | None,
    group_ids: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Group of each of so many members; -1, which is no group, where masked."""
    if group_ids is None:
        group_ids = torch.arange(number, device=device) // (group_size or 1)
    return group_ids if mask is None else group_ids.masked_fill(mask == 0, -1)


def members_of(group_ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The members in the order of their groups, and where each group begins among them."""
    ordered_ids, order = group_ids.long().sort(stable=True)
    bounds = torch.arange(groups + 1, device=group_ids.device)
    return order, torch.searchsorted(ordered_ids, bounds)


def _check(
    rewards: Tensor,
    group_size: int | None,
    group_ids: Tensor | None,
    num_groups: int | None,
    mask: Tensor | None,
    std: str,
    eps: float,
) -> int:
    check_tensor("rewards", rewards, FLOATS)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
    check_mask("mask", mask, rewards.shape, rewards)
    if std not in STD_MODES:
        raise ValueError(f"std must be one of {', '.join(STD_MODES)}; got {std!r}")
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if group_ids is not None and group_size is None:
        check_tensor("group_ids", group_ids, (torch.int64, torch.int32), rewards.shape, rewards)
        if num_groups is None or num_groups < 0:
            raise ValueError(f"group_ids needs num_groups >= 0, got {num_groups}")
        return num_groups
    if group_size is not None and group_ids is None:
        if num_groups is not None:
            raise ValueError(
                "num_groups goes with group_ids; group_size alone says how many there are"
            )
        if group_size < 1 or rewards.numel() % group_size:
            raise ValueError(
                f"group_size must divide the number of rewards, {rewards.numel()}, got {group_size}"
            )
        return rewards.numel() // group_size
    raise ValueError("give either group_size or group_ids with num_groups")


def _check_baseline(rewards: Tensor, baseline: str, lengths: Tensor | None, std: str) -> None:
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}; got {baseline!r}")
    if (baseline == "length_weighted") != (lengths is not None):
        raise ValueError(f"lengths go with baseline='length_weighted' only, got {baseline!r}")
    if lengths is None:
        return
    check_tensor("lengths", lengths, LENGTHS, rewards.shape, rewards)
    check_no_grad("lengths", lengths)
    if std == "leave_one_out":
        raise ValueError(
            f"std='leave_one_out' goes with baseline='mean' or 'leave_one_out', got {baseline!r}"
        )


def _forward(inputs: GroupAdvantagesInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, mean, std, degenerate = _allocate(inputs)
    if inputs.num_groups:
        arguments = GroupAdvantagesArguments(
            groups=inputs.num_groups,
            rewards=inputs.rewards,
            lengths=inputs.lengths,
            group_size=inputs.group_size,
            order=inputs.order,
            offsets=inputs.offsets,
            std_mode=inputs.std_mode,
            leave_one_out=inputs.leave_one_out,
            eps=inputs.eps,
            advantages=advantages,
            mean=mean,
            std=std,
            degenerate=degenerate,
        )
        dispatch.load(inputs.backend).group_advantages_forward(arguments)
    return advantages, mean, std, degenerate


def _allocate(inputs: GroupAdvantagesInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, groups = inputs.rewards, inputs.num_groups
    # zeros: a completion whose group id is out of range belongs to no group
    return (
        rewards.new_zeros(rewards.shape, dtype=torch.float32),
        rewards.new_empty((groups,), dtype=torch.float32),
        rewards.new_empty((groups,), dtype=torch.float32),
        rewards.new_zeros((), dtype=torch.int32),
    )


def _backward(inputs: GroupAdvantagesBackwardInputs) -> Tensor:
    rewards, mean = inputs.rewards, inputs.mean
    grad_rewards = rewards.new_zeros(rewards.shape, dtype=torch.float32)
    if mean.numel():
        forward = GroupAdvantagesArguments(
            groups=mean.numel(),
            rewards=rewards,
            lengths=inputs.lengths,
            group_size=inputs.group_size,
            order=inputs.order,
            offsets=inputs.offsets,
            std_mode=inputs.std_mode,
            leave_one_out=inputs.leave_one_out,
            eps=inputs.eps,
            advantages=None,
            mean=mean,
            std=inputs.std,
            degenerate=None,
        )
        arguments = GroupAdvantagesBackwardArguments(
            forward=forward, grad_advantages=inputs.grad_advantages, grad_rewards=grad_rewards
        )
        dispatch.load(inputs.backend).group_advantages_backward(arguments)
    return grad_rewards


def _fake_backward(inputs: GroupAdvantagesBackwardInputs) -> Tensor:
    return inputs.rewards.new_empty(inputs.rewards.shape, dtype=torch.float32)


_backward_operator = Operator("group_advantages_backward", _backward, _fake_backward)


def _save(ctx: Any, inputs: GroupAdvantagesInputs, output: tuple[Tensor, ...]) -> None:
    ctx.group_size, ctx.backend = inputs.group_size, inputs.backend
    ctx.std_mode, ctx.leave_one_out, ctx.eps = inputs.std_mode, inputs.leave_one_out, inputs.eps
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        inputs.rewards, inputs.lengths, inputs.order, inputs.offsets, *output[1:3]
    )


def _differentiate(
    ctx: Any,
    grad_advantages: Tensor | None,
    grad_mean: Tensor | None,
    grad_std: Tensor | None,
    _grad_degenerate: None,
) -> tuple[Tensor | None]:
    if grad_mean is not None or grad_std is not None:
        raise RuntimeError(
            "mean and std of group_advantages are not differentiable; its advantages are"
        )
    if grad_advantages is None:
        return (None,)
    rewards, lengths, order, offsets, mean, std = ctx.saved_tensors
    inputs = GroupAdvantagesBackwardInputs(
        rewards=rewards,
        lengths=lengths,
        group_size=ctx.group_size,
        order=order,
        offsets=offsets,
        std_mode=ctx.std_mode,
        leave_one_out=ctx.leave_one_out,
        eps=ctx.eps,
        mean=mean,
        std=std,
        grad_advantages=grad_advantages,
        backend=ctx.backend,
    )
    return (_backward_operator(inputs).to(rewards.dtype),)


_operator = Operator(
    "group_advantages", _forward, _allocate, _save, _differentiate, differentiable=1
)
