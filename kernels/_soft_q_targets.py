"""Targets of the two Q-functions of soft actor-critic.

    y = r + gamma (1 - terminated) (min(q1, q2) - alpha log pi)

where q1, q2 are the target networks' values of the next state and of the action that the policy
takes there, and log pi is the logprob of that action.

Source: https://arxiv.org/abs/1812.05905 eq. 2 and 3; the smaller of two Q-functions,
https://arxiv.org/abs/1802.09477 eq. 10.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.soft_q_targets import SoftQTargetsArguments
from warpo.kernels._checks import FLAGS, FLOATS, check_no_grad, check_tensor
from warpo.kernels._registration import Operator
from warpo.kernels._scan import check_discount
from warpo.kernels._symbolic import as_scalar


class SoftQTargetsInputs(NamedTuple):
    rewards: Tensor
    terminated: Tensor
    next_q1: Tensor
    next_q2: Tensor
    next_logprobs: Tensor
    alpha: Tensor
    gamma: float
    backend: str


def soft_q_targets(
    rewards: Tensor,
    terminated: Tensor,
    next_q1: Tensor,
    next_q2: Tensor,
    next_logprobs: Tensor,
    *,
    alpha: float | Tensor,
    gamma: float,
    backend: str | None = None,
) -> Tensor:
    """rewards + gamma (1 - terminated) (min(next_q1, next_q2) - alpha next_logprobs).

    All arguments are constants; the result is a target.

    Args:
        rewards: (B,) float32 | bfloat16 | float16, any stride.
        terminated: (B,) bool | uint8: no state follows. The next values are never read there (they
            may be NaN). A time limit is no termination: the next values of a truncated episode
            count.
        next_q1, next_q2: like rewards.
        next_logprobs: like rewards; nats.
        alpha: temperature >= 0, or a () float32 tensor on the device, which is not read by the
            host.
        gamma: discount in [0, 1].
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (B,) float32.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or a tensor requires grad.

    Source: https://arxiv.org/abs/1812.05905 eq. 2 and 3. Memory beyond arguments and results: none.
    """
    check_tensor("rewards", rewards, FLOATS)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
    check_no_grad("rewards", rewards)
    check_tensor("terminated", terminated, FLAGS, rewards.shape, rewards)
    following = {"next_q1": next_q1, "next_q2": next_q2, "next_logprobs": next_logprobs}
    for name, tensor in following.items():
        check_tensor(name, tensor, FLOATS, rewards.shape, rewards)
        check_no_grad(name, tensor)
    check_discount("gamma", gamma)
    temperature = _temperature(alpha, rewards)
    backend = dispatch.choose(rewards, backend)
    if backend == "reference":
        values = (next_q1.float(), next_q2.float(), next_logprobs.float())
        return reference.soft_q_targets(rewards.float(), terminated, *values, temperature, gamma)
    inputs = SoftQTargetsInputs(
        rewards=rewards,
        terminated=terminated,
        next_q1=next_q1,
        next_q2=next_q2,
        next_logprobs=next_logprobs,
        alpha=temperature,
        gamma=float(gamma),
        backend=backend,
    )
    return _operator(inputs)


def _temperature(alpha: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(alpha, Tensor):
        check_tensor("alpha", alpha, (torch.float32,), (), like)
        check_no_grad("alpha", alpha)
        return alpha
    if not alpha >= 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    return as_scalar(alpha, like)


def _allocate(inputs: SoftQTargetsInputs) -> Tensor:
    return inputs.rewards.new_empty(inputs.rewards.shape, dtype=torch.float32)


def _forward(inputs: SoftQTargetsInputs) -> Tensor:
    targets = _allocate(inputs)
    arguments = SoftQTargetsArguments(
        transitions=targets.numel(),
        rewards=inputs.rewards,
        terminated=inputs.terminated,
        next_q1=inputs.next_q1,
        next_q2=inputs.next_q2,
        next_logprobs=inputs.next_logprobs,
        alpha=inputs.alpha,
        gamma=inputs.gamma,
        targets=targets,
    )
    dispatch.load(inputs.backend).soft_q_targets(arguments)
    return targets


_operator = Operator("soft_q_targets", _forward, _allocate)
