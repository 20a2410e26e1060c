"""Generalised advantage estimation on rewards less a KL, plus an entropy, in one reverse scan.

    R_t = r_t - kl_coef KL_t - entropy_coef log p_t  [+ terminal reward, on the last valid token]
    A_t = R_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}            returns_t = A_t + V_t

with KL_t an estimator (http://joschu.net/blog/kl-approx.html) of log p - log p_ref:

    k1 = log p - log p_ref        k2 = k1^2 / 2        k3 = e^(-k1) + k1 - 1
    reverse_k3 = 1 - e^(-k1) (1 + k1), of KL(reference || policy)

Source: the penalty in the reward, https://arxiv.org/abs/2203.02155 eq. 2 (there k1 on the whole
response); the entropy, of which -log p_t is a sample, in the reward, https://arxiv.org/abs/1702.08165
eq. 1; advantages, https://arxiv.org/abs/1506.02438 eq. 16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import _scan, dispatch, reference
from warpo.kernels._arguments.gae import ScanArguments, ShapedGaeArguments
from warpo.kernels._checks import FLOATS, check_no_grad, check_number, check_tensor
from warpo.kernels._registration import Operator
from warpo.kernels._scan import (
    Steps,
    empty_like,
    gae_arguments,
    is_empty,
    nothing_like,
    sizes,
)
from warpo.kernels.objectives import KL_ESTIMATORS


class ShapedGaeInputs(NamedTuple):
    logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor | None
    terminal_rewards: Tensor | None
    values: Tensor
    last_values: Tensor | None
    steps: ScanArguments
    adaptive_kl_coef: Tensor | None
    kl: int
    kl_coef: float
    entropy_coef: float
    log_ratio_limit: float
    return_rewards: bool
    backend: str


class ShapedGae(NamedTuple):
    advantages: Tensor
    returns: Tensor
    rewards: Tensor | None


def shaped_gae(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    entropy_coef: float = 0.0,
    rewards: Tensor | None = None,
    terminal_rewards: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    last_values: Tensor | None = None,
    log_ratio_limit: float = 20.0,
    return_rewards: bool = False,
    backend: str | None = None,
) -> ShapedGae:
    """Advantages and returns of tokens whose rewards are penalised by the KL to a reference, and
    raised by what the policy did not expect.

    All arguments are constants: advantages of PPO are computed once, before its epochs.

    Args:
        logprobs: `[B, T]`, or packed `(N,)` with cu_seqlens; of the policy that sampled. float32 |
            bfloat16 | float16, any strides.
        ref_logprobs: like logprobs, of the reference.
        values: like logprobs; values[t] belongs to the state before token t.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1].
        kl_coef: beta >= 0; a () float32 tensor on the device where it adapts (not checked).
        kl_estimator: "k1" | "k2" | "k3" | "reverse_k3".
        entropy_coef: alpha >= 0: -alpha logprobs[t] is added to the reward of token t.
        rewards: like logprobs: rewards of tokens, 0 if not given.
        terminal_rewards: (B,): reward of each sequence, added to its last valid token; nothing if
            it has none. One of the two rewards, or both.
        mask, mask_mode, cu_seqlens, last_values: as in `gae`; with "zero" a masked token has
            neither KL nor entropy.
        log_ratio_limit: exponents of k3 and reverse_k3 are at most this.
        return_rewards: also give R, 0 where masked.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        advantages, returns, rewards: float32, of the shape of logprobs; rewards is None unless
            return_rewards.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or a tensor requires grad.

    Source: https://arxiv.org/abs/2203.02155 eq. 2; entropy, https://arxiv.org/abs/1702.08165 eq. 1.
    Memory beyond arguments and results: none.
    """
    steps = Steps(mask, mask_mode, cu_seqlens, last_values=last_values)
    _scan.check_steps("logprobs", logprobs, steps)
    _scan.check_discount("gamma", gamma)
    _scan.check_discount("gae_lambda", gae_lambda)
    _scan.check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    _check_kl_coef(kl_coef, logprobs)
    _check_entropy_coef(entropy_coef)
    _scan.check_log_ratio_limit(log_ratio_limit)
    _check_rewards(rewards, terminal_rewards, logprobs, cu_seqlens)
    for name, tensor in (("ref_logprobs", ref_logprobs), ("values", values)):
        check_tensor(name, tensor, FLOATS, logprobs.shape, logprobs)
    _scan.check_constants(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        rewards=rewards,
        terminal_rewards=terminal_rewards,
        last_values=last_values,
    )
    if isinstance(kl_coef, Tensor):
        check_no_grad("kl_coef", kl_coef)
    name = dispatch.choose(logprobs, backend)
    if name == "reference":
        options = _scan.reference_options(logprobs, steps)
        advantages, returns, shaped = reference.shaped_gae(
            logprobs.float(),
            ref_logprobs.float(),
            values.float(),
            gamma,
            gae_lambda,
            kl_coef,
            kl_estimator,
            rewards=None if rewards is None else rewards.float(),
            terminal_rewards=None if terminal_rewards is None else terminal_rewards.float(),
            mask=mask,
            mask_mode=mask_mode,
            cu_seqlens=cu_seqlens,
            last_values=options["last_values"],
            log_ratio_limit=log_ratio_limit,
            entropy_coef=entropy_coef,
        )
        return ShapedGae(advantages, returns, shaped if return_rewards else None)
    inputs = ShapedGaeInputs(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        rewards=rewards,
        terminal_rewards=_scan.as_column(terminal_rewards),
        values=values,
        last_values=_scan.as_column(last_values),
        steps=_scan.as_inputs(steps, gamma, gae_lambda),
        adaptive_kl_coef=kl_coef if isinstance(kl_coef, Tensor) else None,
        kl=KL_ESTIMATORS.index(kl_estimator) + 1,
        kl_coef=0.0 if isinstance(kl_coef, Tensor) else kl_coef,
        entropy_coef=entropy_coef,
        log_ratio_limit=log_ratio_limit,
        return_rewards=return_rewards,
        backend=name,
    )
    advantages, returns, shaped = _operator(inputs)
    return ShapedGae(advantages, returns, shaped if return_rewards else None)


def _check_kl_coef(kl_coef: float | Tensor, logprobs: Tensor) -> None:
    if isinstance(kl_coef, Tensor):
        check_tensor("kl_coef", kl_coef, (torch.float32,), (), logprobs)
    elif not 0 <= kl_coef < float("inf"):
        raise ValueError(f"kl_coef must be finite and >= 0, got {kl_coef}")


def _check_entropy_coef(entropy_coef: float) -> None:
    check_number("entropy_coef", entropy_coef)
    if not 0 <= entropy_coef < float("inf"):
        raise ValueError(f"entropy_coef must be finite and >= 0, got {entropy_coef}")


def _check_rewards(
    rewards: Tensor | None,
    terminal_rewards: Tensor | None,
    logprobs: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    if rewards is None and terminal_rewards is None:
        raise ValueError(
            "give rewards (one per token), terminal_rewards (one per sequence) or both"
        )
    if rewards is not None:
        check_tensor("rewards", rewards, FLOATS, logprobs.shape, logprobs)
    if terminal_rewards is not None:
        rows, _ = sizes(logprobs, cu_seqlens)
        check_tensor("terminal_rewards", terminal_rewards, FLOATS, (rows,), logprobs)


def _forward(inputs: ShapedGaeInputs) -> tuple[Tensor, Tensor, Tensor]:
    advantages, returns, shaped = _allocate(inputs)
    logprobs, steps = inputs.logprobs, inputs.steps
    if not is_empty(logprobs, steps.cu_seqlens, advantages, returns, shaped):
        gae = gae_arguments(
            logprobs,
            steps,
            rewards=inputs.rewards,
            terminal_rewards=inputs.terminal_rewards,
            values=inputs.values,
            last_values=inputs.last_values,
            advantages=advantages,
            returns=returns,
        )
        arguments = ShapedGaeArguments(
            gae=gae,
            logprobs=logprobs,
            ref_logprobs=inputs.ref_logprobs,
            kl=inputs.kl,
            kl_coef=inputs.kl_coef,
            adaptive_kl_coef=inputs.adaptive_kl_coef,
            entropy_coef=inputs.entropy_coef,
            log_ratio_limit=inputs.log_ratio_limit,
            shaped_rewards=shaped if inputs.return_rewards else None,
        )
        dispatch.load(inputs.backend).shaped_gae(arguments)
    return advantages, returns, shaped


def _allocate(inputs: ShapedGaeInputs) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = inputs.logprobs
    shaped = empty_like(logprobs) if inputs.return_rewards else nothing_like(logprobs)
    return empty_like(logprobs), empty_like(logprobs), shaped


_operator = Operator("shaped_gae", _forward, _allocate)
