"""Generalised advantage estimation in one reverse scan, over tokens or over environment steps.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}            returns_t = A_t + V_t

Where an episode ends at t the scan is cut: `terminated` drops V_{t+1} and A_{t+1}, `truncated`
replaces V_{t+1} by the value of the final observation and drops A_{t+1}. The backward pass is the
adjoint of the same recursion, walked forward in time.

Source: https://arxiv.org/abs/1506.02438 eq. 16; the scan as affine maps: Blelloch, "Prefix sums and
their applications", section 1.4.
"""

from typing import NamedTuple

from torch import Tensor

from warpo.kernels import _scan, dispatch, reference
from warpo.kernels._checks import FLOATS, check_tensor
from warpo.kernels._gae_operator import GaeInputs, gae_operator
from warpo.kernels._offsets import valid_tokens
from warpo.kernels._scan import Steps
from warpo.kernels._whiten import whiten as whitened


class Gae(NamedTuple):
    advantages: Tensor
    returns: Tensor


def gae(
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
    whiten: bool = False,
    backend: str | None = None,
) -> Gae:
    """Advantages and returns of rewards `[B, T]` or packed `(N,)` (tokens), `[N, T]` or `[T, N]`
    (environment steps).

    Args:
        rewards: 2-D, or 1-D with cu_seqlens; float32 | bfloat16 | float16, any strides.
            Differentiable, as are all values.
        values: like rewards; values[t] belongs to the state before step t.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1].
        mask: like rewards, bool | uint8. Masked slots are never read (they may hold NaN); both
            results are 0 there.
        mask_mode: what a masked step does to the steps before it. "carry": V and A of the next
            valid step pass through it. "zero": it counts as a step with reward 0 and value 0, and
            decays the trace. "compact": as "carry", and the rewards behind the last valid step of
            a row, which alone are read in spite of the mask, are added to the reward of that step;
            they get its gradient. A row without a valid step has no rewards.
        cu_seqlens: (B + 1,) int32: sequence b is steps [cu_seqlens[b], cu_seqlens[b + 1]) of the
            packed 1-D tensors; not descending, within [0, N]. Steps of no sequence are never read;
            results and gradients are 0 there. On a GPU those of a malformed sequence are NaN.
        terminated: like rewards, bool | uint8: the episode ended for good, the next value is 0.
        truncated: like rewards, bool | uint8: the episode was cut, the next value is final_values.
        last_values: values after the last step, one per sequence or environment; 0 if not given, as
            after the last token of a response.
        final_values: like rewards: value of the final observation of step t, read where truncated
            only. Required with truncated.
        done_convention: "ends_at_t": a flag at t says that step t ended an episode. "starts_at_t":
            it says that t is the first step of a new one, so that step t - 1 ended; the flags after
            the last step are last_terminated and last_truncated (none if not given).
        last_terminated: one bool | uint8 a sequence or environment; with "starts_at_t" only.
        last_truncated: likewise.
        time_dim: the dimension of time, -1 (or 1) for [B, T] and [N, T], 0 for [T, N]; not with
            cu_seqlens. No copy is made.
        whiten: advantages to mean 0 and unbiased variance 1 over all valid steps, (A - mean) /
            sqrt(variance + 1e-8); returns are those of the advantages before.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        advantages, returns: float32, of the shape of rewards.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or on the CPU cu_seqlens are
            not.

    Source: https://arxiv.org/abs/1506.02438 eq. 16. Memory beyond arguments and results: none;
    with whiten one float32 per step.
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
    _scan.check_steps("rewards", rewards, steps)
    _scan.check_truncated(steps)
    _scan.check_discount("gamma", gamma)
    _scan.check_discount("gae_lambda", gae_lambda)
    check_tensor("values", values, FLOATS, rewards.shape, rewards)
    name = dispatch.choose(rewards, backend)
    if name == "reference":
        options = _scan.reference_options(rewards, steps)
        advantages, returns = reference.gae(
            rewards.float(), values.float(), gamma, gae_lambda, **options
        )
    else:
        in_rows = _scan.as_rows(steps, rewards, values, final_values)
        inputs = GaeInputs(
            rewards=in_rows[0],
            values=in_rows[1],
            last_values=_scan.as_column(last_values),
            final_values=in_rows[2],
            steps=_scan.as_inputs(steps, gamma, gae_lambda),
            returns_only=False,
            backend=name,
        )
        advantages, returns = _scan.as_given(steps, *gae_operator(inputs))
    if whiten:
        valid = valid_tokens(mask, cu_seqlens, rewards.numel())
        advantages = whitened(advantages, valid, eps=1e-8, backend=backend)
    return Gae(advantages, returns)
