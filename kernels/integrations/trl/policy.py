"""The policy losses of TRL's GRPOTrainer and RLOOTrainer on `ops.policy_loss`.

TRL multiplies the loss of a token by weights >= 0: of the off-policy mask, the entropy mask and
the sampler's correction. Here they multiply its advantage.

Left to TRL: VESPO, most of whose work is its weights, of which it also logs the mean, and whose log
ratios it bounds per token before their sum, unlike surrogate "gamma"; and what is faster there:
CISPO of few tokens and, without a gradient, ratios of sequences of many.

Differs: masked slots may hold NaN or infinity, which TRL multiplies by 0 and so spreads (in GRPO);
and log ratios are bounded by +-80, where exp of float32 overflows in TRL from 88.7 on.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels._policy_metrics import METRICS
from warpo.kernels.integrations.serving import PassOn, as_flags, require, require_served
from warpo.kernels.integrations.trl._library import library
from warpo.kernels.integrations.trl.policy_metrics import (
    Batch,
    beyond,
    log,
    log_bounds,
    log_clipped,
)
from warpo.kernels.objectives import Objective

LOG_RATIO_LIMIT = 80.0
FEW_TOKENS = 1 << 14
REF = "ref_per_token_logps"
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
AGGREGATIONS = {
    "grpo": "sequence-mean-token-mean",
    "sapo": "sequence-mean-token-mean",
    "luspo": "sequence-mean-token-sum",
    "dr_grpo": "sequence-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
}
# Divided by the tokens of all micro-batches of a step.
BY_STEP = ("dapo", "cispo")
# Of the inputs those that may be absent.
OPTIONAL = (
    "old_per_token_logps",
    REF,
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)
# Of images, as the model takes them.
IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class AfterForward:
    """A trainer whose forward pass is done: for TRL's own loss of what the kernels do not take."""

    def __init__(self, trainer: Any, results: tuple) -> None:
        self.__dict__.update(_trainer=trainer, _results=results)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._trainer, name, value)

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple:
        return self._results


@library.replaces("trl.trainer.grpo_trainer", "GRPOTrainer._compute_loss", "policy_loss")
def grpo_loss(original: Callable, self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    ids = inputs["completion_ids"]
    few = ids.numel() < FEW_TOKENS
    require(not (few and self.loss_type == "cispo"), "CISPO of few tokens, where TRL is faster")
    # of completions of one token TRL's metrics are means over sequences, masked ones included
    require(ids.shape[1] > 1, "completions of one token")
    objective = objective_of(self)
    given = [inputs.get(name) for name in OPTIONAL]
    mask = _mask(inputs)
    logprobs, entropy, aux_loss = forward = _forward(self, model, inputs)
    _check(self, model, inputs, forward, given)

    batch = _batch(self, inputs, mask, logprobs, entropy)
    keep = _entropy_mask(self, batch)
    denominator, ref = _denominator(self, inputs, batch), given[1]
    loss, metrics = ops.policy_loss(
        logprobs,
        batch.old_logprobs,
        _weighted_advantages(self, inputs, batch, keep),
        objective,
        mask=batch.mask,
        ref_logprobs=ref if objective.kl_coef else None,
        entropy=entropy,
        denominator=denominator,
    )
    if self.beta != 0.0 and self.args.use_bias_correction_kl:
        kl, metrics[METRICS.index("kl")] = _corrected_kl(self, batch, inputs[REF], denominator)
        loss = loss + self.beta * kl
    policy_loss = loss.detach()
    if self.loss_type not in BY_STEP and batch.accumulated != 1:
        loss = loss / batch.accumulated
    if self._entropy_bonus_enabled:
        loss = loss - _entropy_bonus(self, batch, keep, policy_loss)
    if self.aux_loss_enabled:
        loss = loss + _aux_loss(self, batch.mode, aux_loss) / batch.accumulated
    log(self, batch, metrics)
    return loss


@library.replaces("trl.trainer.rloo_trainer", "RLOOTrainer._compute_loss", "policy_loss")
def rloo_loss(original: Callable, self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    # one action is a whole completion: the ratio is that of the product over its tokens
    objective = _objective("bnpo", "token", 0.0, self.epsilon_low, self.epsilon_high, None)
    logprobs, entropy, aux_loss = forward = _forward(self, model, inputs)
    _check(self, model, inputs, forward, [inputs["old_logps"]])

    mask = inputs["completion_mask"].float()
    summed = torch.linalg.vecdot(logprobs.float(), mask)[:, None]
    old, advantages = inputs["old_logps"][:, None], inputs["advantages"][:, None]
    loss, _ = ops.policy_loss(summed, old, advantages, objective)
    mode = "train" if self.model.training else "eval"
    if self.aux_loss_enabled:
        loss = loss + _aux_loss(self, mode, aux_loss)

    bounds = log_bounds(self.epsilon_low, self.epsilon_high)
    clipped = beyond(summed.detach() - old, advantages, *bounds)
    entropies = torch.linalg.vecdot(entropy.detach().float(), mask)
    rows = torch.stack([entropies, mask.sum(1), clipped[:, 0], advantages[:, 0]], dim=1)
    columns = zip(*self.accelerator.gather(rows).tolist(), strict=True)
    total, tokens, both, signs = map(list, columns)
    found = self._metrics[mode]
    found["entropy"].append(sum(total) / max(sum(tokens), 1.0))
    low = [n if x < 0 else 0.0 for n, x in zip(both, signs, strict=True)]
    log_clipped(found, [1.0] * len(low), low, both)
    return loss


def objective_of(trainer: Any) -> Objective:
    """The objective that a GRPOTrainer's settings ask for; passed on if there is none."""
    args, loss_type = trainer.args, trainer.loss_type
    numbers: tuple = ()
    if loss_type in CLIPPED:
        numbers = trainer.epsilon_low, trainer.epsilon_high, args.delta
    elif loss_type == "cispo":
        numbers = (trainer.epsilon_high,)
    elif loss_type == "sapo":
        numbers = args.sapo_temperature_pos, args.sapo_temperature_neg
    beta = 0.0 if args.use_bias_correction_kl else trainer.beta
    return _objective(loss_type, trainer.importance_sampling_level, beta, *numbers)


@functools.lru_cache
def _objective(loss_type: str, level: str, beta: float, *numbers: Any) -> Objective:
    if loss_type not in AGGREGATIONS:
        raise PassOn(f"loss type {loss_type!r}")
    require(level in ("token", "sequence"), "ratios neither of tokens nor of sequences")
    options: dict[str, Any] = {"surrogate": "reinforce"}
    if loss_type in CLIPPED:
        low, high, delta = numbers
        options = {"surrogate": "clip", "clip_low": low, "clip_high": high}
        if delta is not None:
            # a lower one would be the upper bound where the advantage is positive
            require(delta > 1 + high, "a delta below 1 + epsilon_high")
            options |= {"surrogate": "dual_clip", "dual_clip": delta}
    elif loss_type == "cispo":
        options = {"surrogate": "stop_gradient", "clip_low": 1.0, "clip_high": numbers[0] - 1}
    elif loss_type == "sapo":
        options = {"surrogate": "soft_gate", "tau_positive": numbers[0], "tau_negative": numbers[1]}
    try:
        return Objective(
            ratio_level=level,
            kl_coef=beta,
            aggregation=AGGREGATIONS[loss_type],
            log_ratio_limit=LOG_RATIO_LIMIT,
            **options,
        )
    except ValueError:
        raise PassOn("a bound or coefficient that no kernel has") from None


def _check(
    trainer: Any, model: Any, inputs: dict[str, Any], forward: tuple, given: list[Tensor | None]
) -> None:
    """Pass the loss on, though not the forward pass, unless the kernels take the tensors. Where
    advantages are float32, so is TRL's loss, whatever the logprobs are.
    """
    try:
        advantages = inputs["advantages"]
        require_served(advantages, *forward[:2], *given)
        require(advantages.dtype == torch.float32, "advantages that are not float32")
        level = getattr(trainer, "importance_sampling_level", "token")
        differentiates = forward[0].requires_grad or forward[1].requires_grad
        many = forward[0].numel() >= FEW_TOKENS
        require(
            level == "token" or differentiates or not many,
            "ratios of sequences of many tokens without a gradient, where TRL is faster",
        )
    except PassOn as refusal:
        raise PassOn(refusal.reason, (AfterForward(trainer, forward), model, inputs)) from None


def _mask(inputs: dict[str, Any]) -> Tensor:
    mask = as_flags(inputs["completion_mask"])
    tools = as_flags(inputs.get("tool_mask"))
    assert mask is not None
    return mask if tools is None else mask & tools


def _forward(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple:
    """Logprobs, entropy and the loss of the router of the completions' tokens."""
    return trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].shape[1],
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: inputs.get(name) for name in IMAGES},
    )


def _batch(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, logprobs: Tensor, entropy: Tensor
) -> Batch:
    advantages = inputs["advantages"]
    training = trainer.model.training
    return Batch(
        logprobs=logprobs,
        entropy=entropy,
        old_logprobs=inputs.get("old_per_token_logps"),
        mask=mask,
        advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
        mode="train" if training else "eval",
        accumulated=trainer.current_gradient_accumulation_steps if training else 1.0,
    )


def _entropy_mask(trainer: Any, batch: Batch) -> Tensor | None:
    if trainer.top_entropy_quantile >= 1.0:
        return None
    quantile = 1 - trainer.top_entropy_quantile
    return trainer.get_high_entropy_mask(batch.entropy, batch.mask, quantile)


def _weighted_advantages(
    trainer: Any, inputs: dict[str, Any], batch: Batch, keep: Tensor | None
) -> Tensor:
    """(B, T), or (B,) if they are the same for all tokens of a sequence."""
    weighted = batch.advantages
    if trainer.off_policy_mask_threshold is not None:
        logprobs = batch.logprobs.detach().float()
        old = logprobs if batch.old_logprobs is None else batch.old_logprobs
        weighted = weighted * trainer.get_off_policy_mask(
            advantages=batch.advantages,
            per_token_logps=logprobs,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
            mask=batch.mask,
            off_policy_threshold=trainer.off_policy_mask_threshold,
        )
    if keep is not None:
        weighted = weighted * keep
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        weighted = weighted * inputs["importance_sampling_ratio"]
    if weighted is batch.advantages:
        return inputs["advantages"]
    return weighted[:, 0] if weighted.shape[1] == 1 else weighted


def _denominator(trainer: Any, inputs: dict[str, Any], batch: Batch) -> float | Tensor | None:
    if trainer.loss_type == "dr_grpo":
        return len(batch.logprobs) * trainer.max_completion_length
    if trainer.loss_type not in BY_STEP:
        return None
    # the tokens of all completions that were sampled together, over those steps
    share = 1 / trainer.accelerator.num_processes
    if batch.mode == "train":
        share *= batch.accumulated / trainer.args.steps_per_generation
    tokens = inputs["num_items_in_batch"].clamp(min=1.0)
    return tokens if share == 1 else tokens * share


def _corrected_kl(
    trainer: Any, batch: Batch, ref: Tensor, denominator: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The KL term with `use_bias_correction_kl`: ratio k3, aggregated as the policy loss, and its
    sum over the tokens, a constant. The gradient goes through both factors.
    """
    masked, tokens = ~batch.mask, batch.mask.sum(-1)
    logprobs = batch.logprobs.float().masked_fill(masked, 0.0)
    old = logprobs.detach()
    if batch.old_logprobs is not None:
        old = batch.old_logprobs.masked_fill(masked, 0.0)
    log_weight = logprobs - old
    if trainer.importance_sampling_level == "sequence":
        log_weight = log_weight.sum(-1, keepdim=True) / tokens[:, None].clamp(min=1)
    distance = ref.masked_fill(masked, 0.0) - logprobs
    sums = (torch.exp(log_weight) * (torch.expm1(distance) - distance)).sum(-1)
    aggregation = AGGREGATIONS[trainer.loss_type]
    if denominator is None:
        denominator = tokens.sum().clamp(min=1) if aggregation == "token-mean" else len(sums)
    by_sequence = aggregation == "sequence-mean-token-mean"
    terms = sums / tokens.clamp(min=1) if by_sequence else sums
    return terms.sum() / denominator, sums.detach().sum()


def _entropy_bonus(trainer: Any, batch: Batch, keep: Tensor | None, policy_loss: Tensor) -> Tensor:
    """Loss that the bonus takes off. Logs it and, where the coefficient adapts, adapts that."""
    active = batch.mask if keep is None else batch.mask & keep
    total = torch.where(active, batch.entropy, 0.0).sum(dtype=torch.float32)
    tokens = active.sum()
    coef = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coef = 0.0
    metrics = trainer._metrics[batch.mode]
    metrics["policy_loss"].append(trainer.accelerator.gather(policy_loss).nanmean().item())
    if batch.mode == "train":
        if trainer.use_adaptive_entropy:
            _adapt_entropy_coef(trainer, torch.stack([total.detach(), tokens]))
        if trainer.accelerator.sync_gradients:
            metrics["entropy_coef"].append(trainer.entropy_coef)
    return coef * (total / tokens.clamp(min=1.0) / batch.accumulated)


def _adapt_entropy_coef(trainer: Any, sums: Tensor) -> None:
    """At the end of a step, one move of the coefficient towards the target of the mean entropy over
    its micro-batches and processes. sums: of entropy and tokens, of this micro-batch.
    """
    before = trainer._entropy_window_stats
    trainer._entropy_window_stats = sums if before is None else before + sums
    if not trainer.accelerator.sync_gradients:
        return
    total, tokens = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
    entropy = (total / tokens.clamp(min=1.0)).item()
    args, coef = trainer.args, trainer.entropy_coef
    if entropy <= args.entropy_target:
        trainer.entropy_coef = min(coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        trainer.entropy_coef = max(coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer._last_world_entropy = entropy
    trainer._entropy_window_stats = None


def _aux_loss(trainer: Any, mode: str, aux_loss: Tensor) -> Tensor:
    mean = trainer.accelerator.gather_for_metrics(aux_loss).mean().item()
    trainer._metrics[mode]["aux_loss"].append(mean)
    return trainer.router_aux_loss_coef * aux_loss
