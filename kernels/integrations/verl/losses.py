"""The policy losses of verl, those in its registry among them.

The loss function is one call of `ops.policy_loss`, and its metrics are read from the device once,
not once each. Left to verl: `compute_policy_loss`, which is deprecated and called by nothing;
"dppo_tv" and "dppo_kl", which have A min(ratio, clip_ratio_c) logp with no gradient through the
ratio, where the surrogates "divergence_tv" and "divergence_kl" have A ratio; "clip_cov" and
"kl_cov", which choose tokens by their covariance within a micro-batch; "geo_mean", whose clipping
or metrics no kernel has; "gpg", which is a product and `agg_loss`; "bypass_mode", which calls
"vanilla" or `compute_policy_loss_reinforce`; configurations that are not an `ActorConfig`.

Differs, in each of them: a masked slot is not read, so that a NaN there reaches neither the loss
nor the gradient; without a valid token the loss and its gradient are 0, not NaN.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.serving import PassOn, require, require_served
from warpo.kernels.integrations.verl._library import library
from warpo.kernels.integrations.verl.aggregation import aggregation, flags_of, result_dtype

_MODULE = "verl.trainer.ppo.core_algos"
# log_ratio_limit of an objective where verl does not clamp log ratios; elsewhere both have 20.
_NO_LIMIT = 80.0
# In place of a weight of 0: the product with an advantage keeps the sign of the advantage, by which
# verl counts what is clipped, and is no part of a float32 sum.
_TINY = 1e-37

_TOKENS, _LOG_RATIO = ops.METRICS.index("tokens"), ops.METRICS.index("log_ratio")
_CLIPPED_LOW, _CLIPPED_HIGH = ops.METRICS.index("clipped_low"), ops.METRICS.index("clipped_high")
_CLIPPED_DUAL = ops.METRICS.index("clipped_dual")

Metrics = dict[str, float]
Result = tuple[Tensor, Metrics]


@dataclass
class Call:
    """The arguments of a policy loss of verl."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    loss_agg_mode: str
    config: Any
    weights: Tensor | None
    mask: Tensor = field(init=False)

    def check(self) -> None:
        """Pass the call on unless they are plain tokens, of which log_prob alone is differentiable.
        Makes `mask` of response_mask.
        """
        require(isinstance(self.config, _actor_config()), "a config that is not an ActorConfig")
        given = [self.old_log_prob, self.advantages]
        if self.weights is not None:
            given.append(self.weights)
        require_served(self.log_prob, *given)
        for x in given:
            require(x.shape == self.log_prob.shape, "tensors of two shapes")
            require(not x.requires_grad, "a gradient of what the kernels take for constant")
        self.mask = flags_of(self.response_mask, self.log_prob)

    def bounds(self) -> tuple[float, float]:
        config = self.config
        low, high = config.clip_ratio_low, config.clip_ratio_high
        return (
            config.clip_ratio if low is None else low,
            config.clip_ratio if high is None else high,
        )

    def clip_range(self) -> dict[str, Any]:
        """clip_low and clip_high of an objective; no ratio is below 1 - 1."""
        low, high = self.bounds()
        return {"clip_low": min(low, 1.0), "clip_high": high}

    def evaluate(
        self,
        log_prob: Tensor | None = None,
        old_log_prob: Tensor | None = None,
        ref_log_prob: Tensor | None = None,
        **fields: Any,
    ) -> tuple[Tensor, Tensor]:
        """Loss and metrics of `ops.policy_loss` with an objective of these fields."""
        found = aggregation(self.mask, self.loss_agg_mode, **self.config.global_batch_info)
        objective = _objective(aggregation=found[0], **fields)
        loss, metrics = ops.policy_loss(
            self.log_prob if log_prob is None else log_prob,
            self.old_log_prob if old_log_prob is None else old_log_prob,
            self.weighted_advantages(),
            objective,
            mask=self.mask,
            ref_logprobs=ref_log_prob,
            denominator=found[1],
        )
        dtype = result_dtype(
            self.loss_agg_mode, self.response_mask, self.log_prob, self.advantages, self.weights
        )
        return loss.to(dtype), metrics

    def weighted_advantages(self) -> Tensor:
        """The weights multiply the loss of each token, which is proportional to the advantage."""
        if self.weights is None:
            return self.advantages
        return self.advantages.float() * self.weights.clamp(min=_TINY)


def _policy_loss(name: str, mode: str = "token-mean") -> Callable[[Callable], Callable]:
    """Register a function that returns the result of a `Call`."""

    def register(loss: Callable[[Call], Result]) -> Callable:
        def replacement(
            original: Callable,
            old_log_prob: Tensor,
            log_prob: Tensor,
            advantages: Tensor,
            response_mask: Tensor,
            loss_agg_mode: str = mode,
            config: Any = None,
            rollout_is_weights: Tensor | None = None,
        ) -> Result:
            return _evaluate(
                loss,
                old_log_prob,
                log_prob,
                advantages,
                response_mask,
                loss_agg_mode,
                config,
                rollout_is_weights,
            )

        replacement.__doc__ = loss.__doc__
        return library.replaces(_MODULE, name, "policy_loss")(replacement)

    return register


def _evaluate(loss: Callable[[Call], Result], *arguments: Any) -> Result:
    call = Call(*arguments)
    call.check()
    return loss(call)


@_policy_loss("compute_policy_loss_vanilla")
def vanilla(call: Call) -> Result:
    """PPO with two clip ranges and dual clip."""
    found = call.evaluate(
        surrogate="dual_clip", dual_clip=call.config.get("clip_ratio_c", 3.0), **call.clip_range()
    )
    return found[0], _read(found[1])


@_policy_loss("compute_policy_loss_cispo")
def cispo(call: Call) -> Result:
    """CISPO: the gradient of the logprobs, weighed by the clipped ratio."""
    found = call.evaluate(surrogate="stop_gradient", **call.clip_range())
    return found[0], _read(found[1])


@_policy_loss("compute_policy_loss_sapo", "seq-mean-token-mean")
def sapo(call: Call) -> Result:
    """SAPO, with its aggregation whatever loss_agg_mode is."""
    call.loss_agg_mode = "seq-mean-token-mean"
    found = call.evaluate(
        surrogate="soft_gate", tau_positive=call.config.tau_pos, tau_negative=call.config.tau_neg
    )
    return found[0], _read(found[1])


@_policy_loss("compute_policy_loss_gspo", "seq-mean-token-mean")
def gspo(call: Call) -> Result:
    """GSPO in its token form, https://arxiv.org/abs/2507.18071 eq. 13 and 14: the ratio is that of
    the sequence, and the gradient of each token has its own advantage and weight.
    """
    low, high = call.bounds()
    difference = call.log_prob.detach().float() - call.old_log_prob
    sums = torch.where(call.mask.bool(), difference, 0).sum(-1)
    mean = sums / call.mask.sum(-1).clamp_(min=1)
    # verl holds the log ratio at 10 from above, with no gradient there: a dual clip
    largest = math.exp(10.0)
    found = call.evaluate(
        log_prob=_StraightThrough.apply(call.log_prob, mean),
        old_log_prob=mean.new_zeros(()).expand(call.log_prob.shape),
        surrogate="dual_clip",
        clip_low=min(low, 1.0),
        clip_high=min(high, largest - 1),
        dual_clip=largest,
        log_ratio_limit=_NO_LIMIT,
    )
    return found[0], _read(found[1]) | {"actor/pg_clipfrac_lower": 0.0}


class _StraightThrough(torch.autograd.Function):
    """A number of the sequence in the place of each of its tokens, whose gradient it gets."""

    @staticmethod
    def forward(ctx: Any, of_tokens: Tensor, of_sequences: Tensor) -> Tensor:
        return of_sequences[:, None].expand(of_tokens.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@_policy_loss("compute_policy_loss_dro")
def dro(call: Call) -> Result:
    """The policy gradient with a quadratic penalty on the log ratio: k2 against the old policy.
    Left to verl with weights, which multiply the penalty too.
    """
    beta = call.config.policy_loss.dro_beta
    require(call.weights is None, "DRO with weights")
    require(beta is not None and beta > 0, "DRO without a penalty")
    found = call.evaluate(
        ref_log_prob=call.old_log_prob,
        surrogate="reinforce",
        kl_estimator="k2",
        kl_coef=beta,
        log_ratio_limit=_NO_LIMIT,
    )
    return found[0], _only_kl(_read(found[1]))


@library.replaces(_MODULE, "compute_policy_loss_reinforce", "policy_loss")
def compute_policy_loss_reinforce(
    original: Callable,
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Result:
    """The policy gradient, weighed for samples of another policy."""
    return _evaluate(
        _reinforce,
        rollout_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )


def _reinforce(call: Call) -> Result:
    found = call.evaluate(surrogate="reinforce", log_ratio_limit=_NO_LIMIT)
    return found[0], _only_kl(_read(found[1]))


def _read(metrics: Tensor) -> Metrics:
    """The metrics of `ops.policy_loss` by verl's names, read from the device at once."""
    row = metrics.tolist()
    tokens = max(row[_TOKENS], 1.0)
    return {
        "actor/pg_clipfrac": (row[_CLIPPED_LOW] + row[_CLIPPED_HIGH]) / tokens,
        "actor/ppo_kl": -row[_LOG_RATIO] / tokens,
        "actor/pg_clipfrac_lower": row[_CLIPPED_DUAL] / tokens,
    }


def _only_kl(metrics: Metrics) -> Metrics:
    return {"actor/ppo_kl": metrics["actor/ppo_kl"]}


@functools.lru_cache(maxsize=64)
def _objective(**fields: Any) -> ops.Objective:
    """Passed on are values that ours refuses, such as a negative clip range."""
    try:
        return ops.Objective(**fields)
    except ValueError:
        raise PassOn("clip ranges or coefficients that no kernel has") from None


@functools.cache
def _actor_config() -> type:
    from verl.workers.config import ActorConfig

    return ActorConfig
