"""V-trace: off-policy corrected value targets and advantages, in one reverse scan.

With ratio_t = exp(logprobs_t - old_logprobs_t), rho_t = min(rho_max, ratio_t) and
c_t = lambda min(c_max, ratio_t):

    v_t = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t (v_{t+1} - V_{t+1})
    A_t = min(pg_rho_max, ratio_t) (r_t + gamma v_{t+1} - V_t)

Where an episode ends, and after the last step, the bootstrap value takes the place of both V_{t+1}
and v_{t+1}.

Source: https://arxiv.org/abs/1802.01561 eq. 1, its remark 2 for lambda, and section 4.2.
"""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels import _scan, dispatch, reference
from warpo.kernels._arguments.gae import ScanArguments, VtraceArguments
from warpo.kernels._checks import FLOATS, check_number, check_tensor
from warpo.kernels._registration import Operator
from warpo.kernels._scan import Steps, empty_like, gae_arguments, is_empty


class VtraceInputs(NamedTuple):
    logprobs: Tensor
    old_logprobs: Tensor
    rewards: Tensor
    values: Tensor
    last_values: Tensor | None
    final_values: Tensor | None
    steps: ScanArguments
    rho_max: float
    c_max: float
    pg_rho_max: float
    log_ratio_limit: float
    backend: str


class Vtrace(NamedTuple):
    returns: Tensor
    advantages: Tensor


def vtrace(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    pg_rho_max: float = 1.0,
    gae_lambda: float = 1.0,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
    done_convention: str = "ends_at_t",
    last_terminated: Tensor | None = None,
    last_truncated: Tensor | None = None,
    time_dim: int = -1,
    log_ratio_limit: float = 20.0,
    backend: str | None = None,
) -> Vtrace:
    """Value targets v and policy-gradient advantages of steps that another policy took.

    All arguments are constants; both results are targets.

    Args:
        logprobs: `[B, T]`, `[N, T]` or `[T, N]`, or packed `(N,)` with cu_seqlens; of the policy
            that learns. float32 | bfloat16 | float16, any strides.
        old_logprobs: like logprobs, of the policy that took the steps.
        rewards: like logprobs.
        values: like logprobs; values[t] belongs to the state before step t.
        gamma: discount in [0, 1].
        rho_max: bound of the ratio that weighs a temporal difference, > 0; may be inf.
        c_max: bound of the ratio that weighs the trace, > 0; may be inf.
        pg_rho_max: bound of the ratio that weighs an advantage, > 0; may be inf.
        gae_lambda: lambda in [0, 1].
        mask, mask_mode, cu_seqlens, terminated, truncated, last_values, final_values,
            done_convention, last_terminated, last_truncated, time_dim: as in `gae`; with "zero" a
            masked step has ratio 1.
        log_ratio_limit: the exponent of the ratio is clamped to +- this.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        returns: v, float32, of the shape of logprobs; 0 where masked.
        advantages: likewise.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or a tensor requires grad.

    Source: https://arxiv.org/abs/1802.01561 eq. 1 and section 4.2. Memory beyond arguments and
    results: none.
    """
    steps = Steps(
        mask=mask,
        mask_mode=mask_mode,
        cu_seqlens=cu_seqlens,
        terminated=terminated,
        truncated=truncated,
        last_values=last_values,
        final_values=final_values,
        done_convention=done_convention,
        last_terminated=last_terminated,
        last_truncated=last_truncated,
        time_dim=time_dim,
    )
    _scan.check_steps("logprobs", logprobs, steps)
    _scan.check_truncated(steps)
    _scan.check_discount("gamma", gamma)
    _scan.check_discount("gae_lambda", gae_lambda)
    _scan.check_log_ratio_limit(log_ratio_limit)
    bounds = (rho_max, c_max, pg_rho_max)
    for name, bound in zip(("rho_max", "c_max", "pg_rho_max"), bounds, strict=True):
        check_number(name, bound)
        if not bound > 0:
            raise ValueError(f"{name} must be > 0, got {bound}")
    for name, tensor in (("old_logprobs", old_logprobs), ("rewards", rewards), ("values", values)):
        check_tensor(name, tensor, FLOATS, logprobs.shape, logprobs)
    _scan.check_constants(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        rewards=rewards,
        values=values,
        last_values=last_values,
        final_values=final_values,
    )
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        returns, advantages = reference.vtrace(
            logprobs.float(),
            old_logprobs.float(),
            rewards.float(),
            values.float(),
            gamma,
            rho_max=rho_max,
            c_max=c_max,
            pg_rho_max=pg_rho_max,
            gae_lambda=gae_lambda,
            log_ratio_limit=log_ratio_limit,
            **_scan.reference_options(logprobs, steps),
        )
        return Vtrace(returns, advantages)
    in_rows = _scan.as_rows(steps, logprobs, old_logprobs, rewards, values, final_values)
    inputs = VtraceInputs(
        logprobs=in_rows[0],
        old_logprobs=in_rows[1],
        rewards=in_rows[2],
        values=in_rows[3],
        last_values=_scan.as_column(last_values),
        final_values=in_rows[4],
        steps=_scan.as_inputs(steps, gamma, gae_lambda),
        rho_max=rho_max,
        c_max=c_max,
        pg_rho_max=pg_rho_max,
        log_ratio_limit=log_ratio_limit,
        backend=name,
    )
    return Vtrace(*_scan.as_given(steps, *_operator(inputs)))


def _forward(inputs: VtraceInputs) -> tuple[Tensor, Tensor]:
    returns, advantages = _allocate(inputs)
    logprobs, steps = inputs.logprobs, inputs.steps
    if not is_empty(logprobs, steps.cu_seqlens, returns, advantages):
        gae = gae_arguments(
            logprobs,
            steps,
            rewards=inputs.rewards,
            values=inputs.values,
            last_values=inputs.last_values,
            final_values=inputs.final_values,
            advantages=advantages,
            returns=returns,
        )
        arguments = VtraceArguments(
            gae=gae,
            logprobs=logprobs,
            old_logprobs=inputs.old_logprobs,
            rho_max=inputs.rho_max,
            c_max=inputs.c_max,
            pg_rho_max=inputs.pg_rho_max,
            log_ratio_limit=inputs.log_ratio_limit,
            weighs_advantages=True,
        )
        dispatch.load(inputs.backend).vtrace(arguments)
    return returns, advantages


def _allocate(inputs: VtraceInputs) -> tuple[Tensor, Tensor]:
    return empty_like(inputs.logprobs), empty_like(inputs.logprobs)


_operator = Operator("vtrace", _forward, _allocate)
