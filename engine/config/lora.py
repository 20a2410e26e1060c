"""The section `lora` of a run's settings, and the refusal of what does not go with it."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.sections import NonNegativeInt, Positive, Text, checked
from warpo.engine.errors import ConfigError

if TYPE_CHECKING:
    from warpo.engine.config.policy import Config

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, config=checked)
class LoraSettings:
    """Low-rank adapters of the policy (https://arxiv.org/abs/2106.09685): of the layers that they
    are in W0 stays, and W = W0 + alpha / rank x B A is what learner and sampler compute with."""

    rank: NonNegativeInt = 0
    """Rows of A and columns of B. 0: no adapters, all weights learn. With adapters only A and B do,
    the reference is the model as it was loaded, which takes no second one, and checkpoints hold the
    adapters in the format of PEFT."""
    alpha: Positive = 32.0
    """Scale of the adapters, divided by rank. Their best update.lr is about 10 times that of all
    weights."""
    targets: Text = ALL_LINEAR
    """Linear layers that get adapters. all-linear: all but the head. Otherwise a regular
    expression: those whose whole name it matches, such as .*self_attn.*."""
    base: Literal["device", "host"] = "device"
    """Where W0 of these layers is kept. host: not on the GPU, which gets it layer by layer after an
    optimizer step, and where the reference scores."""


def check_lora(config: Config, row: Algorithm) -> None:
    """Refuse settings of adapters that have no effect or cannot run.

    Raises:
        ConfigError: names the setting.
    """
    lora = config.lora
    if not lora.rank:
        for field in dataclasses.fields(lora):
            if getattr(lora, field.name) != field.default:
                raise ConfigError(
                    f"lora.{field.name} = {getattr(lora, field.name)!r} has no effect: lora.rank "
                    "is 0, which means no adapters"
                )
        return
    try:
        re.compile(lora.targets)
    except re.error as error:
        raise ConfigError(
            f"lora.targets = {lora.targets!r} is not a regular expression: {error}"
        ) from None
    if row.reference_every_steps:
        raise ConfigError(
            f"loss.reference_every_steps = {row.reference_every_steps} of algorithm = "
            f"{row.name!r} does not go with lora.rank = {lora.rank}, where the reference is the "
            "model without its adapters: set the one or the other to 0"
        )
