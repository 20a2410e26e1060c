"""OpenRLHF's functions of logits: log probabilities, entropy, the loss of a language model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.openrlhf._library import (
    LOSSES,
    UTILITIES,
    library,
    same_shape,
)
from warpo.kernels.integrations.serving import require, require_served

# Of the estimate of the KL, and of the importance weight of its gradient, as the library has them.
_KL_LIMIT, _WEIGHT_LIMIT = 10.0, 10.0


@library.replaces(UTILITIES, "log_probs_from_logits", "logprobs", rounds=True)
def log_probs_from_logits(
    original: Callable, logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """The caller's logits are divided by the temperature, as the library does it: entropies that
    are computed from them afterwards are those of the policy at that temperature.

    Differs: a label outside the vocabulary gives NaN, -100 gives 0; there both are errors, or are
    not, with flash-attn.
    """
    _require_rows(logits, labels)
    if temperature != 1.0:
        logits.div_(temperature)
    return ops.logprobs(logits, labels).to(logits.dtype)


@library.replaces(UTILITIES, "compute_entropy", "logprobs_and_entropy", rounds=True)
def compute_entropy(original: Callable, logits: Tensor) -> Tensor:
    """Differs: a logit of -inf has probability 0 and adds nothing; there it makes NaN."""
    _require_rows(logits)
    targets = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    return ops.logprobs_and_entropy(logits, targets).entropy.to(logits.dtype)


@library.replaces(UTILITIES, "compute_approx_kl", "approx_kl")
def compute_approx_kl(
    original: Callable,
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    old = log_probs_old if unbiased_gradient else None
    estimators = ("k1", "k2", "k3") if unbiased_gradient else ("k2", "k3")
    require(kl_estimator in estimators, "an estimator without a kernel")
    require_served(log_probs, log_probs_base, old)
    require(same_shape(log_probs, log_probs_base, old), "logprobs of two shapes")
    require(log_probs.dim() in (1, 2), "logprobs that are not [N] or [B, T]")
    if not unbiased_gradient:
        return ops.approx_kl(log_probs, log_probs_base, kl_estimator, limit=_KL_LIMIT)
    weight = None
    if old is not None:
        with torch.no_grad():
            weight = (log_probs.float() - old.float()).exp_().clamp_(max=_WEIGHT_LIMIT)
    return ops.approx_kl(
        log_probs, log_probs_base, kl_estimator, gradient="k2", limit=_KL_LIMIT, weight=weight
    )


@library.replaces(LOSSES, "GPTLMLoss.forward", "logprobs")
def language_model_loss(original: Callable, self: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Differs: a label outside the vocabulary gives NaN, there an error."""
    require(self.ring_attn_group is None, "ring attention")
    _require_rows(logits, labels)
    labels = labels[..., 1:]
    logprobs = ops.logprobs(logits[..., :-1, :], labels, ignore_index=self.IGNORE_INDEX)
    tokens = labels.ne(self.IGNORE_INDEX).sum()
    return (logprobs.sum() / -tokens).to(logits.dtype)


def _require_rows(logits: Tensor, labels: Tensor | None = None) -> None:
    require_served(logits)
    require(logits.dim() in (2, 3) and logits.stride(-1) == 1, "logits that are not dense rows")
    if labels is not None:
        require(labels.dtype == torch.int64, "labels that are not int64")
        require(labels.shape == logits.shape[:-1], "labels that are not one per row of logits")
