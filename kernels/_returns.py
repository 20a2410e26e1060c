"""Discounted returns and lambda returns, in the reverse scan of `gae`.

    discounted: G_t = r_t + gamma G_{t+1}
    lambda:     G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1})

The first is the second with lambda = 1; the second is A_t + V_t with the advantages of `gae`. Where
an episode ends, and after the last step, the bootstrap value takes the place of G_{t+1}.

Source: Sutton and Barto, "Reinforcement learning", 2nd edition, eq. 3.9 and 12.18 (TD(lambda)).
"""

from torch import Tensor

from warpo.kernels import _scan, dispatch, reference
from warpo.kernels._checks import FLOATS, check_tensor
from warpo.kernels._gae_operator import GaeInputs, gae_operator
from warpo.kernels._scan import Steps


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float,
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
    backend: str | None = None,
) -> Tensor:
    """Sum of the rewards from each step on, discounted: G_t = r_t + gamma G_{t+1}.

    Args:
        rewards: `[B, T]`, `[N, T]` or `[T, N]`, or packed `(N,)` with cu_seqlens; float32 |
            bfloat16 | float16, any strides. Differentiable, as are last_values and final_values.
        gamma: discount in [0, 1].
        last_values: the return after the last step, one per sequence or environment; 0 if not
            given.
        final_values: like rewards: the return after a truncated step; required with truncated.
        mask, mask_mode, cu_seqlens, terminated, truncated, done_convention, last_terminated,
            last_truncated, time_dim: as in `gae`.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        float32, of the shape of rewards; 0 where masked.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: Sutton and Barto, "Reinforcement learning", 2nd edition, eq. 3.9. Memory beyond
    arguments and result: none.
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
    return _returns(rewards, None, gamma, 1.0, steps, backend)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
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
    backend: str | None = None,
) -> Tensor:
    """The targets of TD(lambda): G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1}).

    Args:
        rewards: `[B, T]`, `[N, T]` or `[T, N]`, or packed `(N,)` with cu_seqlens; float32 |
            bfloat16 | float16, any strides. Differentiable, as are all values.
        values: like rewards, required; values[t] belongs to the state before step t.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1].
        mask, mask_mode, cu_seqlens, terminated, truncated, last_values, final_values,
            done_convention, last_terminated, last_truncated, time_dim: as in `gae`.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        float32, of the shape of rewards; 0 where masked.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: Sutton and Barto, "Reinforcement learning", 2nd edition, eq. 12.18. Memory beyond
    arguments and result: none.
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
    check_tensor("values", values, FLOATS)  # without values the reference would forget gae_lambda
    return _returns(rewards, values, gamma, gae_lambda, steps, backend)


def _returns(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    gae_lambda: float,
    steps: Steps,
    backend: str | None,
) -> Tensor:
    _scan.check_steps("rewards", rewards, steps)
    _scan.check_truncated(steps)
    _scan.check_discount("gamma", gamma)
    _scan.check_discount("gae_lambda", gae_lambda)
    if values is not None:
        check_tensor("values", values, FLOATS, rewards.shape, rewards)
    name = dispatch.choose(rewards, backend)
    if name == "reference":
        options = _scan.reference_options(rewards, steps)
        if values is None:
            return reference.discounted_returns(rewards.float(), gamma, **options)
        return reference.lambda_returns(
            rewards.float(), values.float(), gamma, gae_lambda, **options
        )
    rewards, values, final_values = _scan.as_rows(steps, rewards, values, steps.final_values)
    inputs = GaeInputs(
        rewards=rewards,
        values=values,
        last_values=_scan.as_column(steps.last_values),
        final_values=final_values,
        steps=_scan.as_inputs(steps, gamma, gae_lambda),
        returns_only=True,
        backend=name,
    )
    _, returns = gae_operator(inputs)
    return _scan.as_given(steps, returns)[0]
