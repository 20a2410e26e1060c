"""Advantages of a fixed number of steps.

    A_t = sum_{l < n} gamma^l delta_{t+l}                 delta_t = r_t + gamma V_{t+1} - V_t
        = r_t + ... + gamma^{n-1} r_{t+n-1} + gamma^n V_{t+n} - V_t

n = 1 is the temporal difference, `gae` with lambda 0; n of at least the length of a sequence is
`gae` with lambda 1. Where fewer than n steps are left the sum ends with the sequence.

Source: https://arxiv.org/abs/1506.02438 eq. 14, which are the n-step returns of
https://arxiv.org/abs/1602.01783 less the value.
"""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels import _scan, dispatch, reference
from warpo.kernels._arguments.gae import NStepAdvantagesArguments, ScanArguments
from warpo.kernels._checks import FLOATS, check_number, check_tensor
from warpo.kernels._registration import Operator
from warpo.kernels._scan import Steps, empty_like, gae_arguments, is_empty


class NStepAdvantagesInputs(NamedTuple):
    rewards: Tensor
    values: Tensor
    last_values: Tensor | None
    steps: ScanArguments
    n: int
    backend: str


class NStepAdvantages(NamedTuple):
    advantages: Tensor
    returns: Tensor


def n_step_advantages(
    rewards: Tensor,
    values: Tensor,
    *,
    n: int,
    gamma: float,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    last_values: Tensor | None = None,
    backend: str | None = None,
) -> NStepAdvantages:
    """Advantages of n steps of tokens, and the returns of n steps, A_t + V_t.

    All arguments are constants: both results are targets.

    Args:
        rewards: `[B, T]`, or packed `(N,)` with cu_seqlens; float32 | bfloat16 | float16, any
            strides.
        values: like rewards; values[t] belongs to the state before token t.
        n: number of steps, >= 1.
        gamma: discount in [0, 1].
        mask, mask_mode, cu_seqlens, last_values: as in `gae`: the n steps are valid ones, with
            "zero" masked ones too.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        advantages, returns: float32, of the shape of rewards; 0 where masked.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or a tensor requires grad.

    Source: https://arxiv.org/abs/1506.02438 eq. 14. Memory beyond arguments and results: none; on a
    GPU each step reads the n rewards after it, from the caches.
    """
    steps = Steps(mask, mask_mode, cu_seqlens, last_values=last_values)
    _scan.check_steps("rewards", rewards, steps)
    _scan.check_discount("gamma", gamma)
    check_number("n", n)
    if not (isinstance(n, int) and 1 <= n < 2**31):
        raise ValueError(f"n must be an integer in [1, 2**31), got {n}")
    check_tensor("values", values, FLOATS, rewards.shape, rewards)
    _scan.check_constants(rewards=rewards, values=values, last_values=last_values)
    name = dispatch.choose(rewards, backend)
    if name == "reference":
        found = reference.n_step_advantages(
            rewards.float(),
            values.float(),
            n,
            gamma,
            mask=mask,
            mask_mode=mask_mode,
            cu_seqlens=cu_seqlens,
            last_values=_scan.reference_options(rewards, steps)["last_values"],
        )
        return NStepAdvantages(*found)
    inputs = NStepAdvantagesInputs(
        rewards=rewards,
        values=values,
        last_values=_scan.as_column(last_values),
        steps=_scan.as_inputs(steps, gamma, 1.0),
        n=n,
        backend=name,
    )
    return NStepAdvantages(*_operator(inputs))


def _forward(inputs: NStepAdvantagesInputs) -> tuple[Tensor, Tensor]:
    advantages, returns = _allocate(inputs)
    rewards, steps = inputs.rewards, inputs.steps
    if not is_empty(rewards, steps.cu_seqlens, advantages, returns):
        gae = gae_arguments(
            rewards,
            steps,
            rewards=rewards,
            values=inputs.values,
            last_values=inputs.last_values,
            advantages=advantages,
            returns=returns,
        )
        arguments = NStepAdvantagesArguments(gae=gae, n=inputs.n)
        dispatch.load(inputs.backend).n_step_advantages(arguments)
    return advantages, returns


def _allocate(inputs: NStepAdvantagesInputs) -> tuple[Tensor, Tensor]:
    return empty_like(inputs.rewards), empty_like(inputs.rewards)


_operator = Operator("n_step_advantages", _forward, _allocate)
