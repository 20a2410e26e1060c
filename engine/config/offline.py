"""Every setting of training from given data: one tree, validated before a model is loaded.

The text under a field is its line in `warpo train --help`.
"""

from __future__ import annotations

from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from warpo.engine.config.policy import looks_like_a_path
from warpo.engine.config.sections import (
    CheckpointSettings,
    Count,
    FilePath,
    FilePathOrEmpty,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Seed,
    Text,
    checked,
)
from warpo.engine.errors import ConfigError
from warpo.kernels.preferences import PREFERENCES, Preference

# The keys of the section `loss` that each row reads; those of the rows of PREFERENCES follow.
LOSS_KEYS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "bradley_terry": ("centering_coef",),
    "k_wise": ("centering_coef",),
    "process_reward": (),
}
_PREFERENCE_KEYS = {
    "logistic": ("beta", "margin", "label_smoothing", "nll_coef"),
    "hinge": ("beta", "margin", "nll_coef"),
    "square": ("beta", "nll_coef"),
}
LOSS_KEYS |= {name: _PREFERENCE_KEYS[row.link] for name, row in PREFERENCES.items()}


@dataclass(frozen=True, kw_only=True, config=checked)
class OfflineData:
    """Examples to learn from and to be measured on. "prompt" is text or chat messages. A completion
    continues it letter by letter; it is ended with the token that ends a turn of the chat template,
    or the end-of-sequence token after text."""

    train: FilePath
    """sft: {"prompt", "completion"}. Preference rows: {"prompt", "chosen", "rejected"}.
    bradley_terry: the same, and "margin" where wanted. kto: {"prompt", "completion", "label"}, the
    label true or false. k_wise: {"prompt", "completions"}, best to worst. process_reward:
    {"prompt", "steps", "labels"}: the completion in parts, and a number from 0 to 1 for each."""
    eval: FilePathOrEmpty = ""
    """Held-out examples, same form. Empty: none."""
    step_separator: str = "\n"
    """Text that ends a step of a completion, for process_reward; kept in the config of the model.
    Empty: every token is a step."""


@dataclass(frozen=True, kw_only=True, config=checked)
class OfflineLoss:
    """Numbers of the loss. "row" stands for the value in the table warpo.kernels.preferences, for
    beta = 0.1 in kto and for weights of 1. A key that a row does not read is refused."""

    beta: Positive | Literal["row"] = "row"
    """Strength of the pull to the reference; scale of the difference without one; weight of the
    odds in orpo."""
    margin: NonNegative | Literal["row"] = "row"
    """Amount by which beta times the difference of a pair should exceed 0. Not for ipo, kto."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | Literal["row"] = "row"
    """Probability that a pair is the wrong way round. Rows with a logistic loss."""
    nll_coef: NonNegative | Literal["row"] = "row"
    """Weight of the negative log-likelihood of the chosen completion, in nats per token. Not for
    kto."""
    desirable_weight: NonNegative | Literal["row"] = "row"
    """kto: weight of completions whose label is true."""
    undesirable_weight: NonNegative | Literal["row"] = "row"
    """kto: weight of completions whose label is false."""
    centering_coef: NonNegative = 0.0
    """bradley_terry, k_wise: weight of (better + worse score)^2, which holds the mean score near
    0."""


@dataclass(frozen=True, kw_only=True, config=checked)
class OfflineUpdate:
    """AdamW on a batch of examples."""

    lr: Positive = 1e-6
    """Learning rate after warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """The gradient is scaled down to this L2 norm. A large number switches it off."""
    optimizer_state: Literal["device", "host"] = "device"
    """Where moments and float32 master weights lie and AdamW runs. host: 8 (float32) or 12
    (bfloat16) bytes per weight less on the GPU, for a step on the CPU."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly to lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up the learning rate stays, or falls to 0 at the end of the run, linearly or by
    half a cosine."""
    token_budget: Count = 16384
    """Tokens of a micro-batch, those that its sequences share counted once; one example with all
    its completions must fit. Changes memory and speed, never the gradient."""
    activation_checkpointing: Literal["auto", "none", "block"] = "auto"
    """block: keep only the input of each layer for the backward pass, which computes the layer a
    second time: less memory, about a third more time, the same gradient bit for bit. auto: on CUDA
    block where a step without it does not fit, by the plan of a micro-batch whose tokens are all
    learned, else none; on a CPU none."""
    compile: bool = False
    """Compile what surrounds the attention of a layer with torch.compile: the first step takes
    longer, later ones less. Not for mixtures of experts."""


@dataclass(frozen=True, kw_only=True, config=checked)
class OfflineEvaluation:
    """Loss on data.eval, and accuracy and margin where the row has them."""

    every_steps: NonNegativeInt = 0
    """Evaluate every N steps; 0: never."""
    max_examples: Count = 256
    """Examples that are evaluated, from the start of the file."""


@dataclass(frozen=True, kw_only=True, config=checked)
class OfflineConfig:
    """One run of training from given data."""

    algorithm: Text
    """sft; dpo, ipo, conservative_dpo, robust_dpo, hinge, slic, simpo, orpo, dpo_nll or kto;
    bradley_terry, k_wise or process_reward for a model with one number per token."""
    model: FilePath
    """Directory of a Hugging Face model, or its name on the hub. It is the reference too."""
    output_dir: FilePath
    """Where metrics, plot and checkpoints go."""
    steps: Count
    """Total optimizer steps."""
    batch_size: Count = 16
    """Examples per optimizer step."""
    seed: Seed = 0
    """Fixes data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained. "auto": cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. "auto": bfloat16 on CUDA, float32 on a CPU."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir; begin where there is none."""
    data: OfflineData
    loss: OfflineLoss = field(default_factory=OfflineLoss)
    update: OfflineUpdate = field(default_factory=OfflineUpdate)
    evaluation: OfflineEvaluation = field(default_factory=OfflineEvaluation)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        if self.algorithm not in LOSS_KEYS:
            raise ConfigError(
                f"algorithm = {self.algorithm!r} does not train from given data; those that do: "
                + ", ".join(LOSS_KEYS)
            )
        _check_inputs(self)
        _check_loss(self)


def _check_inputs(config: OfflineConfig) -> None:
    if looks_like_a_path(config.model) and not Path(config.model).is_dir():
        raise ConfigError(f"model: there is no directory {config.model}")
    if config.evaluation.every_steps and not config.data.eval:
        raise ConfigError(
            f"evaluation.every_steps = {config.evaluation.every_steps} needs data.eval: "
            "give a file of held-out examples, or set evaluation.every_steps to 0"
        )
    if config.data.step_separator != "\n" and config.algorithm != "process_reward":
        raise ConfigError(
            f"data.step_separator = {config.data.step_separator!r} has no effect in algorithm "
            f"{config.algorithm!r}: only process_reward has steps"
        )
    warmup = config.update.warmup_steps
    if warmup >= config.steps > 1:
        raise ConfigError(
            f"update.warmup_steps = {warmup} must be below the {config.steps} steps of the run"
        )


def _check_loss(config: OfflineConfig) -> None:
    read = LOSS_KEYS[config.algorithm]
    for key in fields(OfflineLoss):
        value = getattr(config.loss, key.name)
        if value != key.default and key.name not in read:
            raise ConfigError(
                f"loss.{key.name} = {value!r} has no effect in algorithm {config.algorithm!r}, "
                f"which reads {', '.join(f'loss.{name}' for name in read) or 'no key of loss'}"
            )
    if config.algorithm in PREFERENCES:
        resolve_preference(config)


def resolve_preference(config: OfflineConfig) -> Preference:
    """The row of warpo.kernels.preferences that `algorithm` names, with the overrides of `loss`."""
    row = PREFERENCES[config.algorithm]
    return row.replace(**given(config.loss, LOSS_KEYS[config.algorithm]))


def given(loss: OfflineLoss, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the keys that are set to a number."""
    return {name: getattr(loss, name) for name in names if getattr(loss, name) != "row"}
