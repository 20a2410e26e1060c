"""The commands that read configs: train, check and algorithms, and the texts of their help."""

from __future__ import annotations

import importlib
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.file import Key, keys, peek, read_tree, sections
from warpo.engine.config.policy import Config, load_config
from warpo.engine.config.resolve import find
from warpo.engine.errors import ConfigError
from warpo.engine.run.process import (
    expand_segments,
    keep_freed_memory,
    set_thread_waiting,
    world_size,
)
from warpo.engine.run.terminal import OutputConsole

EXAMPLE_YAML = """\
model: models/Qwen2.5-0.5B        # a Hugging Face directory
output_dir: runs/sums
algorithm: grpo                   # `warpo algorithms` lists them all
steps: 100
data:
  train: sums.jsonl               # lines like {"prompt": "2+3=", "answer": "5"}
reward:
  sources: my_rewards:exact       # def exact(completions, answer): return [...]
rollout:
  group_size: 8
  max_new_tokens: 64
update:
  lr: 1e-5
"""

TRAIN_HELP = """\
usage: warpo train CONFIG.yaml [--key value | --section.key value ...]

Trains a model by reinforcement learning. A step samples completions of some prompts, scores them
with your reward function, turns the scores of each prompt's group into advantages, takes one or
more optimizer steps on the policy loss, and hands the new weights to the sampler.

Example, CONFIG.yaml:

{yaml}
and my_rewards.py next to it, which gets the completions and the data fields that it names:

    def exact(completions, answer):
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

    warpo train CONFIG.yaml
    warpo train CONFIG.yaml --steps 200 --resume        # goes on, or begins; a setting changed
    warpo train CONFIG.yaml --update.betas 0.9 0.95

output_dir then holds metrics.jsonl (one row per step), tensorboard/, learning.png, config.yaml and
checkpoints/step-000100/, which transformers and vLLM load.

These are the settings of the algorithms that learn from sampled completions. Those that learn from
given data or in gymnasium environments have others: warpo train --help sft, dpo, sac, ...

Settings:
"""

OTHER_HELP = """\
usage: warpo train CONFIG.yaml [--key value | --section.key value ...]

Settings of algorithm: {algorithm}. A config to begin with:
{example}
"""

CHECK_HELP = """\
usage: warpo check CONFIG.yaml [--plan-only] [--key value | --section.key value ...]

Tries what a run of this config relies on, with its model, data and sampler. Nothing is written.

  memory plan        Peak of each phase of a step, load, sample, score, update and publish,
                     predicted before a weight is read, next to the memory that is free. Then a step
                     of the largest shape that the config allows is run, and measured: 5 % apart at
                     most.
  sampler against    Sampler and learner score the same tokens after an update, and the learner
  learner            packed rows and the model's own eager attention: probe.tolerance apart at most,
                     and a tenth of it in the mean.
  loss invariance    The gradient of an optimizer step, for every objective of the engine, whether
                     its rollouts travel in one micro-batch, one by one or packed by a token budget,
                     at most 1e-6 apart, or each by itself through the model's own eager attention,
                     at most 1e-5 apart.

    warpo check CONFIG.yaml
    warpo check CONFIG.yaml --plan-only                 # does it fit? in seconds, loads no model
    warpo check CONFIG.yaml --plan-only --update.token_budget 32768

The settings are those of `warpo train --help`. Exit status: 0 all holds; 1 something does not, and
its line says what to do; 2 wrong usage.
"""


def output_dir(args: Sequence[str]) -> str | None:
    """Return the folder where a traceback is kept: output_dir of a run."""
    match args:
        case ["train", config, *overrides]:
            return peek(Path(config), overrides, "output_dir")
    return None


# What follows loads torch late, since a mistyped setting must not wait for it.
def train(path: str, overrides: Sequence[str]) -> int:
    family, config = read_config(path, overrides)
    _check_ranks()
    expand_segments()
    if family != "control":
        set_thread_waiting()
    module = _TRAINERS.get(family, "warpo.engine.trainers.offline.train")
    trainer: Any = importlib.import_module(module)
    from warpo.engine.run.device import learner_device

    if family != "control" and learner_device(config).type == "cpu":
        keep_freed_memory()
    trainer.run(config)
    return 0


def _check_ranks() -> None:
    if world_size() > 1:
        raise ConfigError(
            f"WORLD_SIZE = {world_size()}: warpo trains in one process; start it without torchrun"
        )


_TRAINERS = {
    "policy": "warpo.engine.trainers.policy.train",
    "control": "warpo.engine.trainers.control.train",
}


def read_config(path: str, overrides: Sequence[str]) -> tuple[str, Any]:
    """The family of a config's algorithm, and the config.

    Raises:
        ConfigError: it cannot be read, or cannot run here.
    """
    family = _row(path, overrides).family
    if family == "policy":
        return family, load_config(path, overrides)
    return family, read_tree(tree_of(family), Path(path), overrides)


def _row(path: str, overrides: Sequence[str]) -> Algorithm:
    """The algorithm of a config, which decides what settings there are."""
    return find(peek(Path(path), overrides, "algorithm") or Config.algorithm)


def tree_of(family: str) -> type:
    """The settings of a family."""
    if family == "policy":
        return Config
    if family == "control":
        from warpo.engine.config.control import ControlConfig

        return ControlConfig
    from warpo.engine.config.offline import OfflineConfig

    return OfflineConfig


def check(path: str, options: Sequence[str]) -> int:
    overrides = [option for option in options if option != "--plan-only"]
    row = _row(path, overrides)
    if row.family != "policy":
        raise ConfigError(
            f"algorithm = {row.name!r} samples no completions: `warpo check` is for those that do, "
            "whose weights a sampler shares"
        )
    config = load_config(path, overrides)
    _check_ranks()
    expand_segments()
    set_thread_waiting()
    from warpo.engine.preflight.check import run

    return 0 if run(config, plan_only="--plan-only" in options) else 1


def algorithms(name: str = "") -> int:
    from warpo.engine.config import table

    if name == "--compare":
        print(table.comparison())
    elif name:
        print(table.describe(find(name)))
    else:
        # Piped, there is no width to fit.
        table.print_table(OutputConsole(width=None if sys.stdout.isatty() else 200))
    return 0


def show_settings(names: Sequence[str]) -> int:
    row = find(names[0]) if names else ALGORITHMS[Config.algorithm]
    tree = tree_of(row.family)
    print(train_help() if tree is Config else settings_help(tree, row))
    return 0


def settings_help(tree: type, row: Algorithm) -> str:
    """Every setting of a tree."""
    from warpo.engine.config.table import example_of

    head = OTHER_HELP.format(algorithm=row.name, example=example_of(row))
    return "\n".join([head, *_settings(tree)])


def train_help() -> str:
    """Return the text of `warpo train --help`, as wide as the terminal, at most 100 columns."""
    head = TRAIN_HELP.format(yaml=textwrap.indent(EXAMPLE_YAML, "    "))
    return "\n".join([head, *_settings(Config)])


def _settings(tree: type) -> list[str]:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    section = ""
    for key in keys(tree).values():
        head = key.name.rpartition(".")[0]
        if head != section:
            section = head
            text = f"{section}: {' '.join(sections(tree)[section].split())}"
            lines += ["", *textwrap.wrap(text, width)]
        lines += _describe(key, width)
    return lines


def _describe(key: Key, width: int) -> list[str]:
    default = key.default
    if isinstance(default, tuple):
        default = " ".join(str(part) for part in default)
    if isinstance(default, bool):
        default = str(default).lower()
    tail = "(required)" if key.required else f"(default: {default if default != '' else 'empty'})"
    head, indent = f"  --{key.name}  {key.wanted}  {tail}", " " * 8
    return [
        *textwrap.wrap(head, width, subsequent_indent=indent, break_on_hyphens=False),
        *textwrap.wrap(key.text, width, initial_indent=indent, subsequent_indent=indent),
    ]
