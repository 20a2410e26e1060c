"""Estimators of the KL, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.policy_loss import reverse_k3


def approx_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str,
    *,
    gradient: str = "estimator",
    limit: float = torch.inf,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Per token, of any shape."""
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    difference = torch.where(valid, ref_logprobs, 0) - torch.where(valid, logprobs, 0)
    k2 = difference.square() / 2
    if gradient == "k2":
        with torch.no_grad():
            value = _value(difference, estimator, limit)
        weight = torch.ones_like(k2) if weight is None else torch.where(valid, weight, 0)
        return _Replace.apply(value, weight * k2)
    return _value(difference, estimator, limit)


class _Replace(torch.autograd.Function):
    """The first argument, with the gradient of the second; k2 - k2 would lose digits."""

    @staticmethod
    def forward(_ctx, value: Tensor, _other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _value(difference: Tensor, estimator: str, limit: float) -> Tensor:
    # the formula is not differentiated where it is clamped or infinite: 0 times infinity
    with torch.no_grad():
        value = _formula(difference, estimator)
        value = torch.where(difference.isinf() & value.isnan(), torch.inf, value)
        outside = (value.abs() > limit) | value.isinf()
    inside = _formula(torch.where(outside, 0, difference), estimator)
    return torch.where(outside, value.clamp(-limit, limit), inside)


def _formula(difference: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "reverse_k3":
        return reverse_k3(difference, torch.inf)
    return torch.expm1(difference) - difference
