"""Further parts of verl's losses: `agg_loss`, `kl_penalty` and `compute_value_loss`.

Left to verl: the estimators "kl", "k1", "mse" and "k2", which are one to three operations, and
"abs"; `kl_penalty_forward`, which `kl_penalty` alone calls.
`compute_entropy_loss` needs no replacement: it calls `entropy_from_logits` and `agg_loss`, which
have theirs.

Differs: a masked slot is not read, so that a NaN there reaches neither result nor gradient; without
a valid token a loss and its gradient are 0, not NaN.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.serving import PassOn, require, require_constant, require_served
from warpo.kernels.integrations.verl._library import library
from warpo.kernels.integrations.verl.aggregation import aggregation, flags_of, result_dtype

_MODULE = "verl.trainer.ppo.core_algos"
# "+": with the gradient of k2
_ESTIMATORS = {
    "low_var_kl": "k3",
    "k3": "k3",
    "low_var_kl+": "k3",
    "k3+": "k3",
    "mse+": "k2",
    "k2+": "k2",
    "kl+": "k1",
    "k1+": "k1",
}
# what verl clamps k3 to, with no gradient beyond
_K3_LIMIT = 10.0


@library.replaces(_MODULE, "agg_loss", "aggregate")
def agg_loss(
    original: Callable,
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """One number of the losses of tokens, in all modes of verl."""
    require_served(loss_mat)
    mask = flags_of(loss_mask, loss_mat)
    found = aggregation(
        mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    loss = ops.aggregate(loss_mat, found[0], mask=mask, denominator=found[1])
    return loss.to(result_dtype(loss_agg_mode, loss_mask, loss_mat))


@library.replaces(_MODULE, "compute_value_loss", "value_loss")
def compute_value_loss(
    original: Callable,
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped value loss. Differs where a value lies exactly on its clip bound: the gradient is
    that of the unclipped loss, of which verl takes three quarters.
    """
    require_served(vpreds, returns, values)
    require(returns.shape == values.shape == vpreds.shape, "tensors of two shapes")
    require_constant(returns, values)
    require(cliprange_value >= 0, "a clip range below 0")
    mask = flags_of(response_mask, vpreds)
    found = aggregation(
        mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    loss, metrics = ops.value_loss(
        vpreds,
        values,
        returns,
        mask=mask,
        clip_range=cliprange_value,
        aggregation=found[0],
        denominator=found[1],
    )
    clipped = metrics[_CLIPPED] / metrics[_TOKENS].clamp(min=1)
    return loss.to(result_dtype(loss_agg_mode, response_mask, vpreds, returns, values)), clipped


_CLIPPED, _TOKENS = ops.VALUE_METRICS.index("clipped"), ops.VALUE_METRICS.index("tokens")


@library.replaces(_MODULE, "kl_penalty", "approx_kl")
def kl_penalty(original: Callable, logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The estimators of the KL; of those with a "+", the gradient is that of k2."""
    estimator = _ESTIMATORS.get(kl_penalty)
    if estimator is None:
        raise PassOn("an estimator without a kernel")
    require_served(logprob, ref_logprob)
    require(logprob.shape == ref_logprob.shape, "logprobs of two shapes")
    require(logprob.dim() in (1, 2), "logprobs that are not [N] or [B, T]")
    kl = ops.approx_kl(
        logprob,
        ref_logprob,
        estimator,
        gradient="k2" if kl_penalty.endswith("+") else "estimator",
        limit=_K3_LIMIT if estimator == "k3" else math.inf,
    )
    dtype = logprob.dtype
    if ref_logprob.dtype != dtype:
        dtype = torch.promote_types(dtype, ref_logprob.dtype)
    return kl if dtype == torch.float32 else kl.to(dtype)
