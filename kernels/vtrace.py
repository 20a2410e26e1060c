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

from warpo.kernels import dispatch, reference, scan
from warpo.kernels.checks import FLOATS, check_number, check_tensor
from warpo.kernels.positional import PositionalOperator as Operator
from warpo.kernels.scan import Steps, empty_like, is_empty, sizes


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
        mask, mask_mode, cu_seqlens, terminated, truncated, last_values, final_values,
        done_convention, last_terminated, last_truncated, time_dim,
    )  # fmt: skip
    scan.check_steps("logprobs", logprobs, steps)
    scan.check_truncated(steps)
    scan.check_discount("gamma", gamma)
    scan.check_discount("gae_lambda", gae_lambda)
    scan.check_log_ratio_limit(log_ratio_limit)
    bounds = (rho_max, c_max, pg_rho_max)
    for name, bound in zip(("rho_max", "c_max", "pg_rho_max"), bounds, strict=True):
        check_number(name, bound)
        if not bound > 0:
            raise ValueError(f"{name} must be > 0, got {bound}")
    for name, tensor in (("old_logprobs", old_logprobs), ("rewards", rewards), ("values", values)):
        check_tensor(name, tensor, FLOATS, logprobs.shape, logprobs)
    scan.check_constants(
        logprobs=logprobs, old_logprobs=old_logprobs, rewards=rewards, values=values,
        last_values=last_values, final_values=final_values,
    )  # fmt: skip
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        returns, advantages = reference.vtrace(
            logprobs.float(), old_logprobs.float(), rewards.float(), values.float(), gamma,
            rho_max=rho_max, c_max=c_max, pg_rho_max=pg_rho_max, gae_lambda=gae_lambda,
            log_ratio_limit=log_ratio_limit, **scan.reference_options(logprobs, steps),
        )  # fmt: skip
        return Vtrace(returns, advantages)
    results = _operator(
        *scan.as_rows(steps, logprobs, old_logprobs, rewards, values), *scan.operands(steps),
        gamma, gae_lambda, scan.MASK_MODES.index(mask_mode), done_convention == "starts_at_t",
        *bounds, log_ratio_limit, name,
    )  # fmt: skip
    return Vtrace(*scan.as_given(steps, *results))


def _forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor | None,
    final_values: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    last_terminated: Tensor | None,
    last_truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    gae_lambda: float,
    mask_mode: int,
    starts_at_t: bool,
    rho_max: float,
    c_max: float,
    pg_rho_max: float,
    log_ratio_limit: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    returns, advantages = empty_like(logprobs), empty_like(logprobs)
    if not is_empty(logprobs, cu_seqlens, returns, advantages):
        dispatch.load_positional(backend).vtrace(
            *sizes(logprobs, cu_seqlens), cu_seqlens, rewards, None, values, last_values,
            final_values, mask, terminated, truncated, last_terminated, last_truncated,
            gamma, gae_lambda, mask_mode, starts_at_t, advantages, returns,
            logprobs, old_logprobs, rho_max, c_max, pg_rho_max, log_ratio_limit,
        )  # fmt: skip
    return returns, advantages


def _fake_forward(logprobs, *_):
    return empty_like(logprobs), empty_like(logprobs)


_operator = Operator("vtrace", _forward, _fake_forward)
