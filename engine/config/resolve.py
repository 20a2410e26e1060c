"""The row of algorithms.py that a config names, with the config's numbers. What cannot run, or
would have no effect, is refused here, before a model is loaded.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.effects import check_effects, has_effect, shown
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
    row = _structure(row, config.loss)
    check_effects(config, row)
    own: dict[str, Any] = {
        "max_draws": config.rollout.max_draws,
        "baseline_decay": config.loss.baseline_decay,
        "advantage_std": config.loss.advantage_std,
        "pass_at_k": config.loss.pass_at_k,
        "pairs": config.loss.pairs,
        "whiten": config.loss.whiten,
        "reward_entropy_coef": config.loss.reward_entropy_coef,
        "reward_entropy_target": _or_algorithm(config.loss.reward_entropy_target),
        "reward_normalize": config.reward.normalize,
        "reward_clip": _or_algorithm(config.reward.clip),
        "reference_every_steps": config.loss.reference_every_steps,
        "gamma": config.loss.gamma,
        "gae_lambda": config.loss.gae_lambda,
        "pretraining_coef": config.pretraining.coef,
        "right_nll_coef": config.loss.right_nll_coef,
        "covariance_share": config.loss.covariance_share,
        "covariance_range": config.loss.covariance_range,
        "covariance_kl_coef": config.loss.covariance_kl_coef,
        "kl_target": config.loss.kl_target,
    }
    changes = {name: value for name, value in own.items() if value != "algorithm"}
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
    elif isinstance(row.objective, Preference):
        changes["objective"] = _preference(row.objective, config.loss, row.name)
    resolved = row.replace(**changes)
    _check_combinations(config, resolved)
    reward_training(config, resolved)
    return resolved


def _or_algorithm(value: Any) -> Any:
    """Rows have none of what a setting "none" leaves out."""
    return "algorithm" if value == "none" else value


def _structure(row: Algorithm, loss: LossSettings) -> Algorithm:
    """The row with the settings that decide which others it reads."""
    read = has_effect(row)
    changes: dict[str, Any] = {
        name: value
        for name in ("baseline", "reward_to_go")
        if read[f"loss.{name}"] and (value := getattr(loss, name)) != "algorithm"
    }
    objective = row.objective
    if read["loss.kl_in"] and loss.kl_in not in ("algorithm", row.kl_in):
        # the coefficient moves along; the estimator is that of the place
        assert isinstance(objective, Objective)
        in_loss = row.reward_kl_coef if loss.kl_in == "loss" else 0.0
        changes |= {
            "kl_in": loss.kl_in,
            "objective": objective.replace(kl_coef=in_loss),
            "reward_kl_coef": 0.0 if loss.kl_in == "loss" else objective.kl_coef,
        }
    return row.replace(**changes)


def _objective(
    objective: Objective, loss: LossSettings, kl: dict[str, Any], name: str
) -> Objective:
    """The objective of the row with the overrides of `loss`."""
    given: dict[str, Any] = dict(kl)
    if loss.clip_range != "algorithm":
        given["clip_low"], given["clip_high"] = loss.clip_range
    for setting in ("entropy_coef", "aggregation", "kl_gradient", "kl_level", "sequence_mask"):
        if (value := getattr(loss, setting)) != "algorithm":
            given[setting] = value
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
    try:
        return objective.replace(**given)
    except ValueError as error:
        raise ConfigError(f"loss of algorithm = {name!r}: {error}") from None


def _preference(preference: Preference, loss: LossSettings, name: str) -> Preference:
    """The loss of pairs of the row with the overrides of `loss`."""
    given: dict[str, float] = {}
    if loss.kl_coef == 0:
        raise ConfigError(
            f"loss.kl_coef = 0, which is the beta of algorithm = {name!r}: set it above 0"
        )
    if loss.kl_coef != "algorithm":
        given["beta"] = loss.kl_coef
    if loss.nll_coef != "algorithm":
        given["nll_coef"] = loss.nll_coef
    return preference.replace(**given)


def _check_updates(config: Config, row: Algorithm) -> None:
    update = config.update
    if update.max_kl != "none" and update.epochs == 1:
        raise ConfigError(
            f"update.max_kl = {update.max_kl:g} has no effect: it ends the epochs of a step, and "
            "update.epochs is 1"
        )
    objective = row.objective
    if (
        isinstance(objective, Objective)
        and objective.sequence_mask < math.inf
        and objective.correction == "none"
        and update.per_step == 1
    ):
        raise ConfigError(
            f"loss.sequence_mask = {objective.sequence_mask:g} has no effect: the policy has not "
            "moved in the first optimizer step of a step. Set update.epochs or update.minibatches "
            "to 2 or more, or loss.correction"
        )
    to_old = (row.previous_reference and row.kl_coef) or row.covariance == "kl"
    if to_old and update.per_step == 1:
        raise ConfigError(
            f"algorithm = {row.name!r} has no penalty in the first optimizer step of a step, where "
            "the policy is the old one: set update.epochs or update.minibatches to 2 or more"
        )
    low, high = row.covariance_range
    if not low < high:
        raise ConfigError(
            f"loss.covariance_range = {low:g} {high:g}: the lowest covariance must be below the "
            "highest"
        )


def _check_baseline(config: Config, row: Algorithm) -> None:
    """Refuse what a row makes of its baseline and this baseline has not."""
    if not row.estimator.reads_baseline:
        return
    baseline = f"loss.baseline = {row.baseline!r}"
    if row.rescaled and not row.may_redraw:
        raise ConfigError(
            f"{baseline} does not go with algorithm = {row.name!r}, which makes up for groups "
            "whose advantages are all 0: choose group, leave_one_out or optimal, without "
            "loss.reward_to_go"
        )
    if row.max_draws > 1 and not row.may_redraw:
        raise ConfigError(
            f"rollout.max_draws = {row.max_draws} of algorithm = {row.name!r} replaces groups of "
            f"equal rewards, which teach with {baseline} too: set rollout.max_draws to 1"
        )
    if row.advantage_std == "none":
        return
    if not row.subtracts.of_group:
        raise ConfigError(
            f"{baseline} compares no completions of a group, whose deviation algorithm = "
            f"{row.name!r} divides by: set loss.advantage_std to none"
        )
    if row.reward_to_go:
        raise ConfigError(
            f"loss.reward_to_go = True gives each token a reward of its own, and "
            f"loss.advantage_std = {row.advantage_std!r} is the deviation of whole completions: "
            "set loss.advantage_std to none"
        )


def _check_subsets(config: Config, row: Algorithm) -> None:
    """Refuse k completions of which no advantage can be made."""
    if not row.estimator.compares_subsets:
        return
    k, group = row.pass_at_k, config.rollout.group_size
    place = f"loss.pass_at_k = {k} of algorithm = {row.name!r}"
    if k > group:
        raise ConfigError(
            f"{place} is more than the completions of a prompt, rollout.group_size = {group}: "
            "lower the one or raise the other"
        )
    if row.advantages == "pkpo" and k == 1:
        raise ConfigError(
            f"{place} leaves no other completion to compare with: set it to 2 or more, or choose "
            "algorithm: rloo, which is its limit"
        )
    if row.advantages == "pass_at_k_training" and k == group:
        raise ConfigError(
            f"{place} is all of the completions of a prompt, rollout.group_size = {group}: there "
            "is one best reward, and every advantage is 0. Lower the one or raise the other"
        )


def _check_sources(config: Config, row: Algorithm) -> None:
    """Refuse sources that do not give the rewards that a row learns from."""
    sources = parse_sources(config.reward.sources)
    given = f"reward.sources = {', '.join(config.reward.sources)}"
    if row.estimator.needs_steps and not any(source.may_give_steps for source in sources):
        raise ConfigError(
            f"algorithm = {row.name!r} learns from rewards of steps, and {given} gives none: add "
            "process_model:DIR, or a function or server that returns lists of (end, score)"
        )
    weighed = sum(source.weight != 0 for source in sources)
    if row.estimator.needs_sources and weighed < 2:
        raise ConfigError(
            f"algorithm = {row.name!r} normalises the rewards of two or more sources apart, and "
            f"{given} has {weighed} of a weight other than 0: add one, or choose grpo"
        )


def _check_combinations(config: Config, row: Algorithm) -> None:
    _check_updates(config, row)
    group, critic = config.rollout.group_size, config.critic
    if row.needs_group and group < 2:
        std = ", and the standard deviation of one is 0" if row.advantage_std != "none" else ""
        raise ConfigError(
            f"rollout.group_size = {group} is too small for algorithm = {row.name!r}: its "
            f"advantages compare the completions of a prompt{std} "
            f"(loss.advantage_std = {row.advantage_std!r}). Set rollout.group_size to 2 or more"
        )
    _check_baseline(config, row)
    _check_subsets(config, row)
    pair = config.rollout.max_model_len + config.rollout.max_new_tokens
    if row.estimator.makes_pairs and config.update.token_budget < pair:
        raise ConfigError(
            f"update.token_budget = {config.update.token_budget} cannot hold a pair of algorithm = "
            f"{row.name!r}: raise it to {pair}, rollout.max_model_len + rollout.max_new_tokens"
        )
    _check_sources(config, row)
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
        raise ConfigError(f"loss.gae_lambda = {shown(row.gae_lambda)}: ALPHA must be above 0")
    if row.pretraining_coef and not config.pretraining.data:
        raise ConfigError(
            f"pretraining.coef = {row.pretraining_coef:g} of algorithm = {row.name!r} needs "
            "pretraining.data: give a file of examples, or set pretraining.coef to 0"
        )
    if config.pretraining.data and not row.pretraining_coef:
        raise ConfigError(
            f"pretraining.data has no effect on algorithm = {row.name!r}: set pretraining.coef"
        )
    if config.pretraining.aggregation != "token-mean" and not row.pretraining_coef:
        raise ConfigError(
            f"pretraining.aggregation = {config.pretraining.aggregation!r} has no effect on "
            f"algorithm = {row.name!r}: its pretraining.coef is 0"
        )
    if row.reference_every_steps and not row.has_reference:
        raise ConfigError(
            f"loss.reference_every_steps = {row.reference_every_steps} has no effect on algorithm "
            f"= {row.name!r}: it has no reference, since loss.kl_coef is 0"
        )
    if row.reward_entropy_target and not row.reward_entropy_coef:
        raise ConfigError(
            f"loss.reward_entropy_target = {shown(row.reward_entropy_target)} needs a "
            "loss.reward_entropy_coef above 0 to start from"
        )
    if row.kl_target and not row.kl_coef:
        raise ConfigError(
            f"loss.kl_target = {row.kl_target:g} needs a loss.kl_coef above 0 to start from"
        )
