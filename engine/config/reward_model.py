"""Training of a reward model in the run: which source it is, which one labels, and how often."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.reward_sources import Source, parse_sources, same_source
from warpo.engine.errors import ConfigError

if TYPE_CHECKING:
    from warpo.engine.config.policy import Config

_NO_SOURCE = ("algorithm", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTraining:
    """What `reward_model` of a config means.

    Attributes:
        model, labels: the source that is trained, and the one whose scores order the completions
            of a group, by their names in the metrics.
        every_steps: steps of an outer iteration.
    """

    model: str
    labels: str
    every_steps: int


def reward_sources(config: Config) -> tuple[str, ...]:
    """All sources that a run opens: reward.sources, and at weight 0 the one that only labels."""
    sources, labels = config.reward.sources, config.reward_model.labels
    if labels in _NO_SOURCE or any(same_source(labels, text) for text in sources):
        return sources
    return (*sources, f"0 * {labels}")


def reward_training(config: Config, row: Algorithm) -> RewardTraining | None:
    """How the reward model learns; None where it stays as it is.

    Args:
        row: with the numbers of the config.

    Raises:
        ConfigError: the settings cannot be met, or would have no effect.
    """
    settings, sources = config.reward_model, parse_sources(config.reward.sources)
    models = [source for source in sources if source.kind.name == "model"]
    if settings.labels in _NO_SOURCE:
        _check_unused(config, row, models)
        return None
    labels = _labels(config)
    trained = [source for source in models if source.target != labels.target]
    if len(trained) != 1:
        found = ", ".join(source.target for source in trained) or "none"
        raise ConfigError(
            f"reward_model.labels = {labels.name!r} needs one model:DIR among reward.sources to "
            f"train besides the one that labels, found {found}"
        )
    pair = config.rollout.max_model_len + config.rollout.max_new_tokens
    if config.update.token_budget < pair:
        raise ConfigError(
            f"update.token_budget = {config.update.token_budget} cannot hold a pair that the "
            f"reward model learns from: raise it to {pair}, rollout.max_model_len + "
            "rollout.max_new_tokens"
        )
    if config.rollout.group_size < 2:
        raise ConfigError(
            "reward_model.labels has no effect with rollout.group_size = 1: the reward model "
            "learns from completions of one prompt; set it to 2 or more"
        )
    names = {
        (source.kind.name, source.target): source.name
        for source in parse_sources(reward_sources(config))
    }
    return RewardTraining(
        model=names["model", trained[0].target],
        labels=names[labels.kind.name, labels.target],
        every_steps=_every_steps(config, row),
    )


def _labels(config: Config) -> Source:
    text = config.reward_model.labels
    try:
        (labels,) = parse_sources([text])
    except ConfigError as error:
        raise ConfigError(str(error).replace("reward.sources", "reward_model.labels")) from None
    if labels.weight != 1:
        raise ConfigError(
            f"reward_model.labels = {text!r}: a weight has no effect, since labels are compared "
            "with each other only: give the source without it"
        )
    return labels


def _every_steps(config: Config, row: Algorithm) -> int:
    every = config.reward_model.every_steps
    if every == "reference":
        if not row.reference_every_steps:
            raise ConfigError(
                f"reward_model.every_steps = 'reference', but algorithm = {row.name!r} never "
                "renews its reference (loss.reference_every_steps = 0): give a number of steps"
            )
        every = row.reference_every_steps
    if every > config.steps:
        raise ConfigError(
            f"the reward model would learn every {every} steps (reward_model.every_steps = "
            f"{config.reward_model.every_steps}), and steps = {config.steps}: lower it to steps "
            "or below"
        )
    return every


def _check_unused(config: Config, row: Algorithm, models: list[Source]) -> None:
    """Refuse settings of a reward model that is not trained, and a row that would lack it."""
    settings = config.reward_model
    asked = row.trains_reward_model and bool(models)
    if asked and settings.labels == "algorithm":
        raise ConfigError(
            f"algorithm = {row.name!r} trains its reward model, {models[0].target}: name the "
            "source of its labels in reward_model.labels, such as math, or set it to none to keep "
            "the reward model as it is"
        )
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name != "labels" and value != field.default:
            raise ConfigError(
                f"reward_model.{field.name} = {value!r} has no effect: reward_model.labels names "
                "no source, so no reward model is trained"
            )
    if settings.labels == "none" and not asked:
        raise ConfigError(
            f"reward_model.labels = 'none' has no effect: algorithm = {row.name!r} with these "
            "reward.sources trains no reward model"
        )
