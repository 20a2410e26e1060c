"""Every setting of a run: one tree of frozen dataclasses, validated before a model is loaded.

The text under a field is its line in `warpo train --help`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from warpo.engine.config.file import read_tree
from warpo.engine.config.log import LogSettings
from warpo.engine.config.lora import LoraSettings, check_lora
from warpo.engine.config.resolve import resolve
from warpo.engine.config.reward_model import reward_sources
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.config.samplers import SAMPLERS
from warpo.engine.config.sections import (
    ROUNDING,
    CheckpointSettings,
    Count,
    CriticSettings,
    DataSettings,
    EvaluationSettings,
    FilePath,
    LossSettings,
    PretrainingSettings,
    ProbeSettings,
    RewardModelSettings,
    RewardSettings,
    RolloutSettings,
    SamplerName,
    Seed,
    Text,
    UpdateSettings,
    checked,
)
from warpo.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=checked)
class Config:
    """One run."""

    model: FilePath
    """Directory of a Hugging Face model, or its name on the hub."""
    output_dir: FilePath
    """Where metrics, plot and checkpoints go."""
    algorithm: Text = "grpo"
    """Row of the table that `warpo algorithms` prints."""
    steps: Count
    """Total reinforcement-learning steps."""
    seed: Seed = 0
    """Fixes data order and every draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner runs. "auto": cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the learner's weights. "auto": bfloat16 on CUDA, float32 on a CPU."""
    lm_head_dtype: Literal["same", "float32"] = "same"
    """Type in which learner and sampler compute logits. The head's weight stays in dtype."""
    sampler: SamplerName = "vllm"
    """Engine that samples."""
    resync: Literal["auto", "alias", "copy"] = "auto"
    """How the learner's weights become the sampler's. "alias": both are one memory, and nothing is
    copied. "copy": each has its own, and buckets are copied after an update. "auto": alias where
    every parameter allows it."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir; begin where there is none."""
    data: DataSettings
    reward: RewardSettings
    reward_model: RewardModelSettings = field(default_factory=RewardModelSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    critic: CriticSettings = field(default_factory=CriticSettings)
    pretraining: PretrainingSettings = field(default_factory=PretrainingSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        _check_inputs(self)
        _check_lengths(self)
        _check_schedule(self)
        check_lora(self, resolve(self))
        _check_label_field(self)

    @property
    def sampler_dtype(self) -> str:
        """Type of the sampler's weights, "same" looked up."""
        return self.dtype if self.rollout.dtype == "same" else self.rollout.dtype

    @property
    def probe_tolerance(self) -> float:
        """probe.tolerance, "auto" looked up."""
        if self.probe.tolerance != "auto":
            return self.probe.tolerance
        return max(ROUNDING[self.dtype], ROUNDING[self.sampler_dtype])

    @property
    def max_prompt_tokens(self) -> int:
        return self.rollout.max_model_len - self.rollout.max_new_tokens


def looks_like_a_path(model: str) -> bool:
    """True if a model is not a name on the hub, which is org/model or model."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model


def _check_inputs(config: Config) -> None:
    if looks_like_a_path(config.model) and not Path(config.model).is_dir():
        raise ConfigError(f"model: there is no directory {config.model}")
    parse_sources(config.reward.sources)
    if config.evaluation.every_steps and not config.data.eval:
        raise ConfigError(
            f"evaluation.every_steps = {config.evaluation.every_steps} needs data.eval: "
            "give held-out prompts, as a file or a number, or set evaluation.every_steps to 0"
        )
    # with dtype = auto again when it is settled
    settled = config.dtype != "auto"
    if config.resync == "alias" and settled and config.sampler_dtype != config.dtype:
        raise ConfigError(
            f"resync = 'alias' needs one dtype: the learner has dtype = {config.dtype!r} and the "
            f"sampler rollout.dtype = {config.rollout.dtype!r}; set resync to copy or auto"
        )


def _check_label_field(config: Config) -> None:
    name, sources = config.reward.label_field, parse_sources(reward_sources(config))
    if name and all(source.kind.name != "openrlhf" for source in sources):
        raise ConfigError(
            f"reward.label_field = {name!r} has no effect: no source is of the form "
            "openrlhf:http://..."
        )


def _check_lengths(config: Config) -> None:
    rollout, budget = config.rollout, config.update.token_budget
    if rollout.max_new_tokens >= rollout.max_model_len:
        raise ConfigError(
            f"rollout.max_new_tokens = {rollout.max_new_tokens} leaves no room for a prompt: "
            f"it must be below rollout.max_model_len = {rollout.max_model_len}"
        )
    if budget < rollout.max_model_len:
        raise ConfigError(
            f"update.token_budget = {budget} cannot hold the longest rollout: raise it to "
            f"rollout.max_model_len = {rollout.max_model_len} or lower that"
        )


def _check_schedule(config: Config) -> None:
    update, rollout = config.update, config.rollout
    num_rollouts = rollout.prompts_per_step * rollout.group_size
    if update.minibatches > num_rollouts:
        raise ConfigError(
            f"update.minibatches = {update.minibatches} is more than the {num_rollouts} rollouts "
            "of a step (rollout.prompts_per_step x rollout.group_size)"
        )
    num_updates = config.steps * update.per_step
    if update.warmup_steps >= num_updates > 1:
        raise ConfigError(
            f"update.warmup_steps = {update.warmup_steps} must be below the {num_updates} "
            "optimizer steps of the run (steps x update.epochs x update.minibatches)"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings in a YAML file, changed by `--key value` and `--section.key value`.

    Raises:
        ConfigError: a key is unknown, a value malformed, or the whole cannot run here.
    """
    config = read_tree(Config, Path(path), overrides)
    sampler = SAMPLERS[config.sampler]
    if sampler.package and importlib.util.find_spec(sampler.package) is None:
        raise ConfigError(
            f"sampler = {sampler.name!r}, but {sampler.title} is not installed: install "
            f"{sampler.package}, or pass --sampler transformers"
        )
    return config
