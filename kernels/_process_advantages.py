"""Advantages from rewards of reasoning steps, in one launch.

    r'_j = (r_j - mean) / (std + eps)        over the steps of all outputs of the group
    A_t  = sum of r'_j over the steps j of the output that end at token t or after it

A group whose steps all have the same reward, of one step too, teaches nothing: A = 0 exactly, std =
0, and it is counted. Rewards are constants: no gradient flows through them.

Source: GRPO with process supervision, https://arxiv.org/abs/2402.03300 section 4.1.3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.process_advantages import ProcessAdvantagesArguments
from warpo.kernels._checks import (
    FLOATS,
    check_mask,
    check_no_grad,
    check_number,
    check_tensor,
)
from warpo.kernels._group_advantages import groups_of, members_of
from warpo.kernels._offsets import check_step_ends, check_values
from warpo.kernels._registration import Operator

INDICES = (torch.int32, torch.int64)
# in the order of the enumeration in csrc/arguments/group_advantages.h
STD_MODES = ("none", "sample", "population")


class ProcessAdvantagesInputs(NamedTuple):
    step_rewards: Tensor
    step_offsets: Tensor
    step_ends: Tensor
    num_tokens: int
    cu_seqlens: Tensor | None
    group_size: int
    num_groups: int
    group_ids: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    std_mode: int
    eps: float
    backend: str


class ProcessAdvantages(NamedTuple):
    advantages: Tensor
    mean: Tensor
    std: Tensor
    num_degenerate: Tensor


def process_advantages(
    step_rewards: Tensor,
    step_offsets: Tensor,
    step_ends: Tensor,
    num_tokens: int,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    std: str = "sample",
    eps: float = 1e-6,
    backend: str | None = None,
) -> ProcessAdvantages:
    """Advantage of each token: the normalised rewards of the steps that end at or after it.

    Args:
        step_rewards: (S,) float32 | bfloat16 | float16, any stride: of all steps of all outputs. A
            constant. A NaN stays in its group; to leave it out, mask its output.
        step_offsets: (B + 1,) int32 | int64: output b has the steps step_offsets[b] up to
            step_offsets[b + 1]; it may have none.
        step_ends: (S,) int32 | int64: index of the last token of each step within its output, not
            descending within an output. The tokens after the last step get 0.
        num_tokens: T, the length of a row of the result; with cu_seqlens N, the tokens of all
            outputs.
        group_size: G: the outputs g G to (g + 1) G are group g. B must be a multiple of it.
        group_ids: (B,) int64 | int32 in [0, num_groups), in any order; instead of group_size. An
            output with another id, such as -1, belongs to no group, as if masked.
        num_groups: number of groups, with group_ids only. A group without steps has mean and std 0.
        mask: (B,) bool | uint8: the outputs that count. The steps of a masked one are not counted
            in mean, std and num_degenerate (their rewards may be NaN), and its advantages are 0.
        cu_seqlens: (B + 1,) int32: the tokens of output b are cu_seqlens[b] up to
            cu_seqlens[b + 1] of one packed row. Tokens of no output get 0.
        std: "sample" | "population" | "none".
        eps: added to the standard deviation.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        advantages: (B, T), or (N,) with cu_seqlens; float32.
        mean, std: (groups,) float32, over steps; std is 0 where it is "none" or all are equal.
        num_degenerate: () int32, on the device: groups with steps that all have the same reward.

    Raises:
        ValueError: a shape, dtype, device or option is not as above; on the CPU also where
            offsets or ends leave what they index, or descend. On a GPU the advantages of such an
            output are NaN, and so is its group where its step_offsets are malformed.

    The baseline is the mean over all steps of the group. Where the policy decides how many steps
    there are, the policy gradient is biased: each further step adds its own distance from it.

    Source: https://arxiv.org/abs/2402.03300 section 4.1.3. Memory beyond arguments and results:
        none with group_size alone; 24 bytes an output with group_ids or mask.
    """
    _check(step_rewards, step_offsets, step_ends, num_tokens, cu_seqlens, std, eps)
    num_outputs = step_offsets.numel() - 1
    groups = _count_groups(num_outputs, group_size, group_ids, num_groups, step_rewards)
    check_mask("mask", mask, (num_outputs,), step_rewards)
    name = dispatch.choose(step_rewards, backend)
    if name == "reference":
        _check_values(step_rewards, step_offsets, step_ends, num_tokens, cu_seqlens)
        ids = groups_of(num_outputs, group_size, group_ids, mask, step_rewards.device)
        return ProcessAdvantages(
            *reference.process_advantages(
                step_rewards.float(),
                step_offsets,
                step_ends,
                num_tokens,
                ids,
                groups,
                cu_seqlens=cu_seqlens,
                std=std,
                eps=eps,
            )
        )
    if mask is not None:
        group_ids = groups_of(num_outputs, group_size, group_ids, mask, step_rewards.device)
        group_size = None
    order = offsets = None
    if group_ids is not None:
        group_ids = group_ids.long().contiguous()
        order, offsets = members_of(group_ids, groups)
    inputs = ProcessAdvantagesInputs(
        step_rewards=step_rewards,
        step_offsets=step_offsets,
        step_ends=step_ends,
        num_tokens=num_tokens,
        cu_seqlens=cu_seqlens,
        group_size=group_size or 0,
        num_groups=groups,
        group_ids=group_ids,
        order=order,
        offsets=offsets,
        std_mode=STD_MODES.index(std),
        eps=eps,
        backend=name,
    )
    return ProcessAdvantages(*_operator(inputs))


def _check(
    step_rewards: Tensor,
    step_offsets: Tensor,
    step_ends: Tensor,
    num_tokens: int,
    cu_seqlens: Tensor | None,
    std: str,
    eps: float,
) -> None:
    check_tensor("step_rewards", step_rewards, FLOATS)
    if step_rewards.dim() != 1:
        raise ValueError(f"step_rewards must be (S,), got {tuple(step_rewards.shape)}")
    check_no_grad("step_rewards", step_rewards)
    check_tensor("step_offsets", step_offsets, INDICES, like=step_rewards)
    if step_offsets.dim() != 1 or step_offsets.numel() == 0:
        raise ValueError(f"step_offsets must be (B + 1,), got {tuple(step_offsets.shape)}")
    check_tensor("step_ends", step_ends, INDICES, step_rewards.shape, step_rewards)
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be >= 0, got {num_tokens}")
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, (torch.int32,), step_offsets.shape, step_rewards)
        if not cu_seqlens.is_contiguous():
            raise ValueError("cu_seqlens must be dense: pass cu_seqlens.contiguous()")
    if std not in STD_MODES:
        raise ValueError(f"std must be one of {', '.join(STD_MODES)}; got {std!r}")
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")


def _check_values(
    step_rewards: Tensor,
    step_offsets: Tensor,
    step_ends: Tensor,
    num_tokens: int,
    cu_seqlens: Tensor | None,
) -> None:
    check_values("cu_seqlens", cu_seqlens, num_tokens)
    check_values("step_offsets", step_offsets, step_rewards.numel(), "steps")
    check_step_ends(step_offsets, step_ends, num_tokens, cu_seqlens)


def _count_groups(
    num_outputs: int,
    group_size: int | None,
    group_ids: Tensor | None,
    num_groups: int | None,
    like: Tensor,
) -> int:
    if group_ids is not None and group_size is None:
        check_tensor("group_ids", group_ids, (torch.int64, torch.int32), (num_outputs,), like)
        if num_groups is None or num_groups < 0:
            raise ValueError(f"group_ids needs num_groups >= 0, got {num_groups}")
        return num_groups
    if group_size is not None and group_ids is None:
        if num_groups is not None:
            raise ValueError(
                "num_groups goes with group_ids; group_size alone says how many there are"
            )
        if group_size < 1 or num_outputs % group_size:
            raise ValueError(
                f"group_size must divide the number of outputs, {num_outputs}, got {group_size}"
            )
        return num_outputs // group_size
    raise ValueError("give either group_size or group_ids with num_groups")


def _forward(inputs: ProcessAdvantagesInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, mean, std, degenerate = _allocate(inputs)
    step_rewards, step_offsets, step_ends = inputs[:3]
    outputs = step_offsets.numel() - 1
    _check_values(step_rewards, step_offsets, step_ends, inputs.num_tokens, inputs.cu_seqlens)
    if outputs:
        arguments = ProcessAdvantagesArguments(
            outputs=outputs,
            groups=inputs.num_groups,
            steps=step_rewards.numel(),
            tokens=inputs.num_tokens,
            cu_seqlens=inputs.cu_seqlens,
            step_rewards=step_rewards,
            step_offsets=step_offsets,
            step_ends=step_ends,
            group_size=inputs.group_size,
            group_ids=inputs.group_ids,
            order=inputs.order,
            offsets=inputs.offsets,
            std_mode=inputs.std_mode,
            eps=inputs.eps,
            advantages=advantages,
            mean=mean,
            std=std,
            degenerate=degenerate,
        )
        dispatch.load(inputs.backend).process_advantages(arguments)
    return advantages, mean, std, degenerate


def _allocate(inputs: ProcessAdvantagesInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    floats: Any = {"dtype": torch.float32, "device": inputs.step_rewards.device}
    if inputs.cu_seqlens is None:
        outputs = inputs.step_offsets.shape[0] - 1
        advantages = torch.empty((outputs, inputs.num_tokens), **floats)
    else:
        advantages = torch.zeros((inputs.num_tokens,), **floats)  # tokens of no output
    statistics = torch.empty if inputs.group_size else torch.zeros  # a group may have no output
    return (
        advantages,
        statistics((inputs.num_groups,), **floats),
        statistics((inputs.num_groups,), **floats),
        inputs.step_rewards.new_zeros((), dtype=torch.int32),
    )


_operator = Operator("process_advantages", _forward, _allocate)
