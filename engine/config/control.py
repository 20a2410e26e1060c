"""Settings of control with gymnasium environments, validated before an environment is built.

The text under a field is its line in `warpo train --help`.
"""

from __future__ import annotations

import difflib
from dataclasses import field
from typing import Annotated, Literal

import gymnasium
from pydantic import Field
from pydantic.dataclasses import dataclass

from warpo.engine.config.sections import (
    CheckpointSettings,
    Count,
    FilePath,
    NonNegative,
    NonNegativeInt,
    Positive,
    Seed,
    Text,
    checked,
)
from warpo.engine.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=checked)
class Sac:
    """Settings of algorithms sac, sac_v and sac_discrete."""

    hidden_size: Count = 256
    """Units per hidden layer of policy and Q-functions."""
    hidden_layers: Count = 2
    """Hidden layers, with ReLU."""
    buffer_size: Count = 1_000_000
    """Most recent steps that the replay buffer keeps; checkpoints contain them."""
    learning_starts: NonNegativeInt = 100
    """Steps with uniform random actions before the first update."""
    batch_size: Count = 256
    """Steps drawn from the buffer for an update."""
    updates_per_step: Count = 1
    """Updates after each step of all environments together."""
    polyak: PositiveShare = 0.005
    """Weight of the Q-functions, in sac_v of V, in the moving average that is the target: tau of
    the paper."""
    temperature: Literal["learned"] | NonNegative = "learned"
    """Weight of the entropy. "learned": starts at 1 and is adapted so that the entropy
    meets target_entropy; sac_v in its paper has a fixed one."""
    target_entropy: Literal["auto"] | float = "auto"
    """Entropy that a learned temperature aims at, nats. "auto": minus the action's dimension, in
    sac_discrete 0.98 log(number of actions)."""
    steps_per_row: Count = 1000
    """Environment steps between two rows of metrics.jsonl; a run stops or saves between rows."""


@dataclass(frozen=True, kw_only=True, config=checked)
class Ppo:
    """Settings of algorithm ppo_gymnasium only."""

    hidden_size: Count = 64
    """Units per hidden layer of policy and value function."""
    hidden_layers: Count = 2
    """Hidden layers of each, with tanh."""
    rollout_steps: Count = 2048
    """Steps of each environment in a rollout: T of the paper."""
    epochs: Count = 10
    """Passes over a rollout."""
    minibatch_size: Annotated[int, Field(ge=2)] = 64
    """Environment steps per optimizer step."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio is clipped to 1 -+ clip_range."""
    value_clip_range: Literal["none"] | Positive = "none"
    """Distance from its old value that a value may move to lower the loss. "none": anywhere."""
    value_coef: NonNegative = 1.0
    """Weight of the value loss, which is half the mean squared error."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: Positive = 0.5
    """The gradient is scaled down to this L2 norm. A large number switches it off."""
    normalize_advantages: bool = True
    """Normalise the advantages of a minibatch to mean 0 and standard deviation 1."""


@dataclass(frozen=True, kw_only=True, config=checked)
class Trpo:
    """Settings of algorithm trpo_gymnasium only."""

    hidden_size: Count = 64
    """Units per hidden layer of policy and value function."""
    hidden_layers: Count = 2
    """Hidden layers of each, with tanh."""
    rollout_steps: Count = 2048
    """Steps of each environment in a rollout."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    max_kl: Positive = 0.01
    """Mean KL(old policy, new policy) that a step may reach, nats: delta of the paper."""
    cg_iterations: Count = 10
    """Iterations of conjugate gradient for the direction of a step."""
    cg_damping: NonNegative = 0.1
    """Multiple of the identity that is added to the Fisher matrix; 0 in the paper."""
    line_search_iterations: Count = 10
    """Lengths of a step that are tried until one is accepted; the policy stays where none is."""
    line_search_shrink: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Length of a try, as a share of the one before it."""
    value_epochs: Count = 10
    """Passes of the value function over a rollout."""
    minibatch_size: Annotated[int, Field(ge=2)] = 64
    """Environment steps per optimizer step of the value function."""
    normalize_advantages: bool = True
    """Normalise the advantages of a rollout to mean 0 and standard deviation 1."""


@dataclass(frozen=True, kw_only=True, config=checked)
class ControlEvaluation:
    """Episodes without exploration, in an environment of their own and always the same."""

    every_steps: NonNegativeInt = 0
    """Evaluate every N environment steps, and after the last; 0: never."""
    episodes: Count = 10
    """Episodes per evaluation."""


@dataclass(frozen=True, kw_only=True, config=checked)
class ControlConfig:
    """One run of an algorithm for control."""

    algorithm: Literal["sac", "sac_v", "sac_discrete", "ppo_gymnasium", "trpo_gymnasium"]
    """sac, sac_v: continuous actions, off-policy. sac_discrete: discrete actions, off-policy.
    ppo_gymnasium, trpo_gymnasium: discrete or continuous actions."""
    environment: Text
    """Id of a gymnasium environment, or module:id, where the module registers it."""
    output_dir: FilePath
    """Where metrics, plot and checkpoints go."""
    steps: Count
    """Total environment steps, over all environments. The last rollout of ppo_gymnasium and
    trpo_gymnasium is completed."""
    seed: Seed = 0
    """Fixes the environments and every draw."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the networks are. "auto": cuda if there is one."""
    num_envs: Count = 1
    """Environments that are stepped together: N of PPO's paper."""
    gamma: Share = 0.99
    """Discount."""
    lr: Positive = 3e-4
    """Learning rate of Adam, which trpo_gymnasium uses for the value function only."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir; begin where there is none."""
    sac: Sac = field(default_factory=Sac)
    ppo: Ppo = field(default_factory=Ppo)
    trpo: Trpo = field(default_factory=Trpo)
    evaluation: ControlEvaluation = field(default_factory=ControlEvaluation)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        _check_environment(self.environment)
        _check_sections(self)
        _check_sac(self)
        _check_rollout(self)


def _check_environment(name: str) -> None:
    try:
        gymnasium.spec(name)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(name, gymnasium.registry, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "an id looks like 'Pendulum-v1'"
        why = str(error).rstrip(".").replace("\n", " ")
        raise ConfigError(f"environment = {name!r} is unknown, {hint} ({why})") from None


# The section of each algorithm.
SECTIONS = {
    "sac": "sac",
    "sac_v": "sac",
    "sac_discrete": "sac",
    "ppo_gymnasium": "ppo",
    "trpo_gymnasium": "trpo",
}


def _check_sections(config: ControlConfig) -> None:
    for section in dict.fromkeys(SECTIONS.values()):
        given = getattr(config, section)
        for name, default in type(given).__dataclass_fields__.items():
            value = getattr(given, name)
            if section != SECTIONS[config.algorithm] and value != default.default:
                raise ConfigError(
                    f"{section}.{name} = {value!r} has no effect with "
                    f"algorithm = {config.algorithm!r}: remove it"
                )


def _check_sac(config: ControlConfig) -> None:
    sac = config.sac
    if SECTIONS[config.algorithm] != "sac":
        return
    if sac.batch_size > sac.buffer_size:
        raise ConfigError(
            f"sac.batch_size = {sac.batch_size} is more than sac.buffer_size = {sac.buffer_size} "
            "steps: lower it or raise that"
        )
    if config.num_envs > sac.buffer_size:
        raise ConfigError(
            f"num_envs = {config.num_envs} is more than sac.buffer_size = {sac.buffer_size}: one "
            "step of all environments must fit"
        )
    if sac.target_entropy != "auto" and sac.temperature != "learned":
        raise ConfigError(
            f"sac.target_entropy = {sac.target_entropy:g} has no effect with "
            f"sac.temperature = {sac.temperature:g}: set sac.temperature to learned"
        )


def _check_rollout(config: ControlConfig) -> None:
    section = SECTIONS[config.algorithm]
    if section == "sac":
        return
    settings = config.ppo if section == "ppo" else config.trpo
    samples = settings.rollout_steps * config.num_envs
    if samples % settings.minibatch_size:
        raise ConfigError(
            f"{section}.minibatch_size = {settings.minibatch_size} does not divide the {samples} "
            f"steps of a rollout ({section}.rollout_steps x num_envs)"
        )
