"""Which settings a row of the policy family reads, and the refusal of those that it does not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.errors import ConfigError
from warpo.kernels.objectives import Objective

if TYPE_CHECKING:
    from warpo.engine.config.policy import Config


def has_effect(row: Algorithm) -> dict[str, bool]:
    """True if a row of the policy family reads a setting, for those that not all rows read."""
    estimator = row.estimator
    weighs_tokens = not estimator.makes_pairs
    no_bounds = ("none", "reinforce", "soft_gate", "gamma")
    surrogate = row.objective.surrogate if isinstance(row.objective, Objective) else "none"
    ratio = surrogate not in no_bounds
    return {
        "loss.aggregation": weighs_tokens,
        "loss.clip_range": ratio,
        "loss.right_nll_coef": weighs_tokens,
        "loss.covariance_share": row.covariance != "none",
        "loss.covariance_range": row.covariance == "clip",
        "loss.covariance_kl_coef": row.covariance == "kl",
        "loss.sequence_mask": weighs_tokens and surrogate != "geometric",
        "loss.nll_coef": estimator.makes_pairs,
        "loss.pairs": estimator.makes_pairs,
        "loss.pass_at_k": estimator.compares_subsets,
        "loss.kl_target": weighs_tokens,
        "loss.kl_estimator": weighs_tokens,
        "loss.kl_in": estimator.shapes_rewards and not row.previous_reference,
        "loss.kl_gradient": weighs_tokens and not row.kl_in_reward,
        "loss.kl_level": weighs_tokens and not row.kl_in_reward,
        "loss.entropy_coef": weighs_tokens,
        "loss.reward_entropy_target": estimator.shapes_rewards,
        "loss.reward_entropy_coef": estimator.shapes_rewards,
        "reward.normalize": estimator.shapes_rewards,
        "reward.clip": estimator.shapes_rewards,
        "loss.correction": weighs_tokens,
        "loss.correction_range": weighs_tokens,
        "loss.baseline": estimator.reads_baseline,
        "loss.baseline_decay": row.baseline == "moving",
        "loss.reward_to_go": estimator.reads_baseline and not estimator.is_causal,
        "loss.whiten": weighs_tokens and not (estimator.is_causal or estimator.needs_sources),
        "loss.gamma": estimator.shapes_rewards,
        "loss.gae_lambda": row.has_critic,
        "loss.advantage_std": row.divides_by_std,
        "loss.reference_every_steps": not row.previous_reference,
        "rollout.max_draws": row.may_redraw,
    }


def check_effects(config: Config, row: Algorithm) -> None:
    """Refuse settings that this row does not read.

    Raises:
        ConfigError: one of them is not the default.
    """
    loss, read = config.loss, has_effect(row)
    read |= {f"critic.{field.name}": row.has_critic for field in dataclasses.fields(config.critic)}
    where = dict.fromkeys(read, f"algorithm = {row.name!r}")
    if row.estimator.reads_baseline and loss.baseline not in ("algorithm", "moving"):
        of_baseline = ("loss.baseline_decay", "loss.advantage_std", "rollout.max_draws")
        where |= dict.fromkeys(of_baseline, f"loss.baseline = {loss.baseline!r}")
    if loss.kl_in == "reward":
        where["loss.kl_gradient"] = where["loss.kl_level"] = "loss.kl_in = 'reward'"
    if row.has_critic:
        shared = config.critic.model == "shared"
        # A head on the policy's trunk learns with it, at its rate and from the first step.
        own = {"critic.lr": not shared, "critic.warmup_steps": not shared, "critic.coef": shared}
        read |= own
        where |= dict.fromkeys(own, f"critic.model = {config.critic.model!r}")
    for name, is_read in read.items():
        section, _, leaf = name.partition(".")
        part = getattr(config, section)
        value = getattr(part, leaf)
        default = type(part).__dataclass_fields__[leaf].default
        if not is_read and value != default:
            raise ConfigError(
                f"{name} = {shown(value)} has no effect on {where[name]}: remove it"
                + (" (it has no critic)" if section == "critic" and not row.has_critic else "")
            )
    for name in ("kl_estimator", "kl_gradient", "kl_level", "kl_in"):
        value = getattr(loss, name)
        unweighed = 0 in (loss.kl_coef, row.kl_coef) and loss.kl_coef in (0, "algorithm")
        if value != "algorithm" and unweighed:
            raise ConfigError(
                f"loss.{name} = {value!r} has no effect: loss.kl_coef is 0"
                + ("" if loss.kl_coef == 0 else f" in algorithm {row.name!r}")
            )


def shown(value: Any) -> str:
    """A value as a message names it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
