"""OpenRLHF's policy loss: PPO with dual clipping, or GSPO, with the correction for a sampler that
is not the policy. One pass gives the loss, its gradient and the metrics.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.openrlhf._library import (
    LOSSES,
    library,
)
from warpo.kernels.integrations.openrlhf.losses import normaliser, require_tokens
from warpo.kernels.integrations.serving import (
    PassOn,
    as_flags,
    promoted,
    require,
    require_constant,
    require_served,
)

_TOKENS = ops.METRICS.index("tokens")
_CLIPPED_LOW, _CLIPPED_HIGH = ops.METRICS.index("clipped_low"), ops.METRICS.index("clipped_high")
_KL, _ENTROPY = ops.METRICS.index("kl"), ops.METRICS.index("entropy")
_CORRECTED = ops.METRICS.index("corrected")

# That of the library's PPO; its GSPO has none, and exp overflows above 88.
_LOG_RATIO_LIMIT = {"ppo": 20.0, "gspo": 80.0}
# Above e^-20, the least weight that the kernel makes of an infinite logprob of the sampler.
_NO_WEIGHT = 1e-8
# With fewer tokens the forward pass alone gains nothing.
_FEW_TOKENS = 2**16


class Sampler(NamedTuple):
    """The correction of one call.

    Attributes:
        logprobs: as the kernel takes them; None without a correction.
        gap: rollout - old.
        filtered: share of sequences that are left out; None where it is that of tokens.
    """

    logprobs: Tensor | None = None
    gap: Tensor | None = None
    filtered: Tensor | None = None


@library.replaces(LOSSES, "PolicyLoss.forward", "policy_loss")
def policy_loss(
    original: Callable,
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Differs: as all losses of tokens (`openrlhf.losses`). An infinite logprob of the old policy
    at a valid token gives NaN. Log ratios of GSPO are cut at +-80, those of the correction at +-20.
    """
    corrects = self.is_correction_level != "off"
    rollout = rollout_log_probs if corrects else None
    _check(self, log_probs, old_log_probs, advantages, action_mask, rollout)
    flags = as_flags(action_mask)
    scale = normaliser(flags, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    objective = _objective(
        self.policy_loss_type,
        self.clip_eps_low,
        self.clip_eps_high,
        self.dual_clip,
        self.token_level_loss,
        *_correction(self),
    )
    gspo = self.policy_loss_type == "gspo"
    sampler = Sampler()
    if rollout is not None and not gspo:
        sampler = _sampler(self, old_log_probs, rollout, flags)
    loss, metrics = ops.policy_loss(
        log_probs,
        rollout if gspo and corrects else old_log_probs,
        advantages,
        objective,
        mask=flags,
        ref_logprobs=old_log_probs,
        sampler_logprobs=sampler.logprobs,
        entropy=sampler.gap,
        kl_coef=_nought(log_probs.device),
        denominator=scale.denominator,
    )
    tokens = metrics[_TOKENS]
    return (
        loss.to(scale.dtype(log_probs, old_log_probs, advantages, action_mask, rollout)),
        (metrics[_CLIPPED_LOW] + metrics[_CLIPPED_HIGH]) / tokens,
        (metrics[_KL] / -tokens).to(promoted(log_probs, old_log_probs, action_mask)),
        *_sampler_metrics(sampler, metrics, tokens, action_mask),
    )


def _check(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None,
    rollout: Tensor | None,
) -> None:
    corrects = self.is_correction_level != "off"
    constants = (old_log_probs, advantages, rollout)
    require(self.policy_loss_type in _LOG_RATIO_LIMIT, "a policy loss without a kernel")
    differentiates = log_probs.requires_grad and torch.is_grad_enabled()
    few = log_probs.numel() < _FEW_TOKENS
    require(differentiates or not few, "few tokens without a gradient, where the library is faster")
    require_served(log_probs, *constants)
    require_tokens(log_probs, *constants, action_mask)
    require_constant(*constants)
    require((rollout is None) != corrects, "a correction without logprobs of the sampler")
    masked = action_mask is not None or not (corrects or self.policy_loss_type == "gspo")
    require(masked, "no mask, which the library needs here")


def _by_the_kernel(self: Any) -> bool:
    """True if the correction is that of single tokens by their ratio."""
    return self.is_correction_level == "token" and self.is_correction_gating == "ratio"


def _correction(self: Any) -> tuple[str, float, float]:
    """correction, correction_low and correction_high of the objective."""
    if self.is_correction_level == "off" or self.policy_loss_type == "gspo":
        return "none", 0.0, 1.0
    if not _by_the_kernel(self):
        return "mask", _NO_WEIGHT, math.inf
    low, high = self.is_correction_threshold
    return "truncate" if self.is_correction_mode == "clip" else "mask", max(low, 0.0), high


@functools.lru_cache
def _objective(
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    token_level: bool,
    correction: str,
    correction_low: float,
    correction_high: float,
) -> ops.Objective:
    """Passed on are numbers that ours does not take."""
    try:
        return ops.Objective(
            ratio_level="token" if kind == "ppo" else "sequence",
            surrogate="clip" if dual_clip is None else "dual_clip",
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=3.0 if dual_clip is None else dual_clip,
            kl_estimator="k1",
            kl_gradient="k2",
            correction=correction,
            correction_low=correction_low,
            correction_high=correction_high,
            aggregation="token-mean" if token_level else "sequence-mean-token-mean",
            log_ratio_limit=_LOG_RATIO_LIMIT[kind],
        )
    except ValueError:
        raise PassOn("clip ranges or thresholds that no kernel has") from None


@functools.lru_cache
def _nought(device: torch.device) -> Tensor:
    """A coefficient with which the kernel adds the KL to its metrics and to nothing else."""
    return torch.zeros((), device=device)


@torch.no_grad()
def _sampler(self: Any, old: Tensor, rollout: Tensor, flags: Tensor | None) -> Sampler:
    gap = rollout - old
    if _by_the_kernel(self):
        return Sampler(rollout, gap)
    assert flags is not None  # or _check would have passed it on
    outside, filtered = _outside(self, old, rollout, gap, flags)
    return Sampler(rollout.masked_fill(outside, math.inf), gap, filtered)


def _outside(
    self: Any, old: Tensor, rollout: Tensor, gap: Tensor, flags: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Tokens, or sequences, that are outside the bounds, and the share of sequences that are.

    What is bounded is, of a token, the binary KL or the total variation of (p, 1 - p) and
    (q, 1 - q), or the ratio; of a sequence the mean over its tokens, of the log ratio.
    """
    by_ratio = self.is_correction_gating == "ratio"
    if by_ratio:
        of_tokens = -gap
    else:
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        if self.is_correction_gating == "tv":
            of_tokens = (p - q).abs()
        else:
            of_tokens = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    whole = self.is_correction_level == "seq"
    if whole:
        of_tokens = torch.where(flags, of_tokens, 0).sum(-1, keepdim=True)
        of_tokens = of_tokens / flags.sum(-1, keepdim=True)
    statistic = of_tokens.exp() if by_ratio else of_tokens
    low, high = self.is_correction_threshold
    outside = statistic.clamp(low, high) != statistic  # also NaN
    return outside, outside.mean(dtype=torch.float32) if whole else None


def _sampler_metrics(
    sampler: Sampler, metrics: Tensor, tokens: Tensor, action_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The KL of the sampler and the old policy, and what the correction leaves out."""
    if sampler.gap is None:
        return None, None
    filtered = sampler.filtered
    if filtered is None:
        filtered = metrics[_CORRECTED] / tokens
    return (metrics[_ENTROPY] / tokens).to(promoted(sampler.gap, action_mask)), filtered
