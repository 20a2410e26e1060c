"""The row of algorithms.py that a config names, with the config's numbers. What cannot run, or
would have no effect, is refused here, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.reward_model import reward_training
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.errors import ConfigError
from warpo.kernels.objectives import Objective
from warpo.kernels.preferences import Preference

if TYPE_CHECKING:
    from warpo.engine.config.policy import Config
from warpo.engine.config.sections import LossSettings


def find(name: str) -> Algorithm:
    """The row of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        raise ConfigError(
            f"algorithm = {name!r} is unknown"
            + (f", did you mean {near[0]!r}?" if near else ".")
            + f" Known: {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[name]


def resolve(config: Config) -> Algorithm:
    """The row that the config names, with the config's numbers.

    Raises:
        ConfigError: there is no such row, it cannot run with these settings, or one of them would
            have no effect on it.
    """
    row = find(config.algorithm)
    if row.family != "policy":
        raise ConfigError(
            f"algorithm = {row.name!r} trains from given data or environments and has other "
            "settings: `warpo train` chooses them by the algorithm of the file"
        )
    _check_effects(config, row)
    own = {
        "max_draws": config.rollout.max_draws,
        "advantage_std": config.loss.advantage_std,
        "reference_every_steps": config.loss.reference_every_steps,
        "gamma": config.loss.gamma,
        "gae_lambda": config.loss.gae_lambda,
        "pretraining_coef": config.pretraining.coef,
        "kl_target": config.loss.kl_target,
    }
    changes: dict[str, Any] = {name: value for name, value in own.items() if value != "algorithm"}
    if changes.get("kl_target") == "fixed":
        changes["kl_target"] = None
    kl = {
        name: getattr(config.loss, name)
        for name in ("kl_coef", "kl_estimator")
        if getattr(config.loss, name) != "algorithm"
    }
    if row.kl_in_reward:
        changes |= {f"reward_{name}": value for name, value in kl.items()}
    if isinstance(row.objective, Objective):
        changes["objective"] = _objective(
            row.objective, config.loss, {} if row.kl_in_reward else kl, row.name
        )
    elif isinstance(row.objective, Preference) and "kl_coef" in kl:
        if not kl["kl_coef"]:
            raise ConfigError(
                f"loss.kl_coef = 0, which is the beta of algorithm = {row.name!r}: set it above 0"
            )
        changes["objective"] = row.objective.replace(beta=kl["kl_coef"])
    resolved = row.replace(**changes)
    _check_combinations(config, resolved)
    reward_training(config, resolved)
    return resolved


def _objective(
    objective: Objective, loss: LossSettings, kl: dict[str, Any], name: str
) -> Objective:
    """The objective of the row with the overrides of `loss`."""
    given: dict[str, Any] = dict(kl)
    if loss.clip_range != "algorithm":
        given["clip_low"], given["clip_high"] = loss.clip_range
    if loss.entropy_coef != "algorithm":
        given["entropy_coef"] = loss.entropy_coef
    if loss.correction != "algorithm":
        kind, _, level = loss.correction.partition("_")
        given |= {"correction": kind} | ({"correction_level": level} if level else {})
    if loss.correction_range != "algorithm":
        low, high = loss.correction_range
        if given.get("correction", objective.correction) == "none":
            raise ConfigError(
                f"loss.correction_range = {low:g} {high:g} has no effect: loss.correction is none"
                + ("" if "correction" in given else f" in algorithm {name!r}")
            )
        if not low < high:
            raise ConfigError(
                f"loss.correction_range = {low:g} {high:g}: the lowest w must be below the highest"
            )
        given |= {"correction_low": low, "correction_high": high}
    return objective.replace(**given)


def has_effect(row: Algorithm) -> dict[str, bool]:
    """True if a row of the policy family reads a setting, for those that not all rows read."""
    no_bounds = ("none", "reinforce", "soft_gate")
    ratio = isinstance(row.objective, Objective) and row.objective.surrogate not in no_bounds
    estimator = row.estimator
    return {
        "loss.clip_range": ratio,
        "loss.kl_target": not estimator.makes_pairs,
        "loss.kl_estimator": not estimator.makes_pairs,
        "loss.entropy_coef": not estimator.makes_pairs,
        "loss.correction": not estimator.makes_pairs,
        "loss.correction_range": not estimator.makes_pairs,
        "loss.gamma": row.has_critic,
        "loss.gae_lambda": row.has_critic,
        "loss.advantage_std": estimator.reads_std,
        "loss.reference_every_steps": not row.previous_reference,
        "rollout.max_draws": estimator.may_redraw,
    }


def _check_effects(config: Config, row: Algorithm) -> None:
    """Refuse settings that this row does not read."""
    loss, read = config.loss, has_effect(row)
    read |= {f"critic.{field.name}": row.has_critic for field in dataclasses.fields(config.critic)}
    where = {name: f"algorithm = {row.name!r}" for name in read}
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
                f"{name} = {_shown(value)} has no effect on {where[name]}: remove it"
                + (" (it has no critic)" if section == "critic" and not row.has_critic else "")
            )
    if (
        loss.kl_estimator != "algorithm"
        and 0 in (loss.kl_coef, row.kl_coef)
        and (loss.kl_coef in (0, "algorithm"))
    ):
        raise ConfigError(
            f"loss.kl_estimator = {loss.kl_estimator!r} has no effect: loss.kl_coef is 0"
            + ("" if loss.kl_coef == 0 else f" in algorithm {row.name!r}")
        )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _check_combinations(config: Config, row: Algorithm) -> None:
    group, critic = config.rollout.group_size, config.critic
    if row.estimator.needs_group and group < 2:
        std = ", and the standard deviation of one is 0" if row.advantage_std != "none" else ""
        raise ConfigError(
            f"rollout.group_size = {group} is too small for algorithm = {row.name!r}: its "
            f"advantages compare the completions of a prompt{std} "
            f"(loss.advantage_std = {row.advantage_std!r}). Set rollout.group_size to 2 or more"
        )
    pair = 2 * config.rollout.max_model_len
    if row.estimator.makes_pairs and config.update.token_budget < pair:
        raise ConfigError(
            f"update.token_budget = {config.update.token_budget} cannot hold a pair of algorithm = "
            f"{row.name!r}: raise it to {pair}, twice rollout.max_model_len"
        )
    sources = parse_sources(config.reward.sources)
    if row.estimator.needs_steps and not any(source.may_give_steps for source in sources):
        raise ConfigError(
            f"algorithm = {row.name!r} learns from rewards of steps, and reward.sources = "
            f"{', '.join(config.reward.sources)} gives none: add process_model:DIR, or a function "
            "or server that returns lists of (end, score)"
        )
    if row.has_critic and critic.model.lower() in ("none", ""):
        raise ConfigError(
            f"critic.model = {critic.model!r}, but algorithm = {row.name!r} takes its advantages "
            "from a critic: set critic.model to policy, shared or a directory, or choose an "
            "algorithm without one, such as reinforce_plus_plus or grpo"
        )
    if critic.model.startswith(("/", "./", "../", "~")) and not Path(critic.model).is_dir():
        raise ConfigError(f"critic.model: there is no directory {critic.model}")
    if critic.warmup_steps >= config.steps and row.has_critic:
        raise ConfigError(
            f"critic.warmup_steps = {critic.warmup_steps} leaves no step of steps = "
            f"{config.steps} to the policy"
        )
    adaptive = str(row.gae_lambda[0])
    if adaptive.startswith("length:") and not float(adaptive.removeprefix("length:")):
        raise ConfigError(f"loss.gae_lambda = {_shown(row.gae_lambda)}: ALPHA must be above 0")
    if row.pretraining_coef and not config.pretraining.data:
        raise ConfigError(
            f"pretraining.coef = {row.pretraining_coef:g} of algorithm = {row.name!r} needs "
            "pretraining.data: give a file of examples, or set pretraining.coef to 0"
        )
    if config.pretraining.data and not row.pretraining_coef:
        raise ConfigError(
            f"pretraining.data has no effect on algorithm = {row.name!r}: set pretraining.coef"
        )
    if row.reference_every_steps and not row.has_reference:
        raise ConfigError(
            f"loss.reference_every_steps = {row.reference_every_steps} has no effect on algorithm "
            f"= {row.name!r}: it has no reference, since loss.kl_coef is 0"
        )
    if row.kl_target and not row.kl_coef:
        raise ConfigError(
            f"loss.kl_target = {row.kl_target:g} needs a loss.kl_coef above 0 to start from"
        )
