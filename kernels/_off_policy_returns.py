"""Returns of steps that another policy took, in the reverse scan of `vtrace`.

With w_t = exp(logprobs_t - old_logprobs_t):

    G_t = r_t + gamma w_{t+1} G_{t+1}

In expectation over steps of the old policy that is the return of the policy that learns, from step
t on and whatever led to it. The off-policy policy gradient with causality weighs the score of step
t by G_t and by prod_{u <= t} w_u. G is what V-trace gives as advantages if there are no values, no
bounds and no ratio in front: w_t G_t = w_t (r_t + gamma w_{t+1} G_{t+1}).

Source: per-decision importance sampling, Precup, Sutton and Singh, "Eligibility traces for
off-policy policy evaluation", ICML 2000, section 3.
"""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels import _scan, dispatch, reference
from warpo.kernels._arguments.gae import ScanArguments, VtraceArguments
from warpo.kernels._checks import FLOATS, check_tensor
from warpo.kernels._registration import Operator
from warpo.kernels._scan import Steps, empty_like, gae_arguments, is_empty

UNBOUNDED = float("inf")


class OffPolicyReturnsInputs(NamedTuple):
    rewards: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    last_values: Tensor | None
    steps: ScanArguments
    log_ratio_limit: float
    backend: str


def off_policy_returns(
    rewards: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    last_values: Tensor | None = None,
    log_ratio_limit: float = 20.0,
    backend: str | None = None,
) -> Tensor:
    """Rewards from each step on, each weighed by the ratios of the steps after the first: G_t = r_t
    + gamma exp(logprobs_{t+1} - old_logprobs_{t+1}) G_{t+1}.

    All arguments are constants, and so is the result: the weight of a score. Its variance grows
    with the product of the ratios, which nothing bounds.

    Args:
        rewards: `[B, T]`, or packed `(N,)` with cu_seqlens; float32 | bfloat16 | float16, any
            strides.
        logprobs: like rewards, of the policy that learns.
        old_logprobs: like rewards, of the policy that took the steps.
        gamma: discount in [0, 1].
        mask, mask_mode, cu_seqlens: as in `gae`; with "zero" a masked step has ratio 1.
        last_values: (B,): the return after the last step, 0 if not given. It has no ratio.
        log_ratio_limit: the exponent of each ratio is clamped to +- this.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        float32, of the shape of rewards; 0 where masked.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or a tensor requires grad.

    Source: Precup, Sutton and Singh, "Eligibility traces for off-policy policy evaluation", ICML
    2000, section 3. Memory beyond arguments and result: none.
    """
    steps = Steps(mask, mask_mode, cu_seqlens, last_values=last_values)
    _scan.check_steps("rewards", rewards, steps)
    _scan.check_discount("gamma", gamma)
    _scan.check_log_ratio_limit(log_ratio_limit)
    for name, tensor in (("logprobs", logprobs), ("old_logprobs", old_logprobs)):
        check_tensor(name, tensor, FLOATS, rewards.shape, rewards)
    _scan.check_constants(
        rewards=rewards, logprobs=logprobs, old_logprobs=old_logprobs, last_values=last_values
    )
    name = dispatch.choose(rewards, backend)
    if name == "reference":
        return reference.off_policy_returns(
            rewards.float(),
            logprobs.float(),
            old_logprobs.float(),
            gamma,
            mask=mask,
            mask_mode=mask_mode,
            cu_seqlens=cu_seqlens,
            last_values=_scan.reference_options(rewards, steps)["last_values"],
            log_ratio_limit=log_ratio_limit,
        )
    inputs = OffPolicyReturnsInputs(
        rewards=rewards,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        last_values=_scan.as_column(last_values),
        steps=_scan.as_inputs(steps, gamma, 1.0),
        log_ratio_limit=log_ratio_limit,
        backend=name,
    )
    return _operator(inputs)


def _forward(inputs: OffPolicyReturnsInputs) -> Tensor:
    returns = _allocate(inputs)
    rewards, steps = inputs.rewards, inputs.steps
    if not is_empty(rewards, steps.cu_seqlens, returns):
        gae = gae_arguments(
            rewards, steps, rewards=rewards, last_values=inputs.last_values, advantages=returns
        )
        arguments = VtraceArguments(
            gae=gae,
            logprobs=inputs.logprobs,
            old_logprobs=inputs.old_logprobs,
            rho_max=UNBOUNDED,
            c_max=UNBOUNDED,
            pg_rho_max=UNBOUNDED,
            log_ratio_limit=inputs.log_ratio_limit,
            weighs_advantages=False,
        )
        dispatch.load(inputs.backend).vtrace(arguments)
    return returns


def _allocate(inputs: OffPolicyReturnsInputs) -> Tensor:
    return empty_like(inputs.rewards)


_operator = Operator("off_policy_returns", _forward, _allocate)
