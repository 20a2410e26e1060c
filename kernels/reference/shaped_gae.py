"""Advantages on rewards with a KL penalty, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.gae import gae
from warpo.kernels.reference.policy_loss import kl_estimate
from warpo.kernels.reference.recursion import add_to_last, move_tail, spans, valid_steps


def shaped_gae(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    *,
    rewards: Tensor | None = None,
    terminal_rewards: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    last_values: Tensor | None = None,
    log_ratio_limit: float = 20.0,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, shaped rewards)."""
    valid = valid_steps(logprobs, mask, cu_seqlens)
    shaped = torch.zeros_like(logprobs) if rewards is None else rewards
    terminal = 0 if terminal_rewards is None else terminal_rewards[:, None]
    if cu_seqlens is None:
        shaped = _with_tails(shaped, terminal, valid, mask_mode)
    else:
        for b, span in enumerate(spans(cu_seqlens)):
            one = 0 if terminal_rewards is None else terminal_rewards[b]
            row = _with_tails(shaped[span], one, valid[span], mask_mode)
            shaped = torch.cat([shaped[: span.start], row, shaped[span.stop :]])
    logp, ref = torch.where(valid, logprobs, 0), torch.where(valid, ref_logprobs, 0)
    kl = kl_estimate(logp, ref, kl_estimator, log_ratio_limit)
    surprise = entropy_coef * logp if entropy_coef else 0
    shaped = torch.where(valid, shaped - kl_coef * kl - surprise, 0)
    advantages, returns = gae(
        shaped, values, gamma, gae_lambda, mask=mask, mask_mode=mask_mode, cu_seqlens=cu_seqlens,
        last_values=last_values,
    )  # fmt: skip
    return advantages, returns, shaped


def _with_tails(rewards: Tensor, terminal: float | Tensor, valid: Tensor, mask_mode: str) -> Tensor:
    """Rewards with those that belong to the last valid step of a row."""
    if mask_mode == "compact":
        rewards = move_tail(rewards, valid)
    return add_to_last(rewards, terminal, valid)
