"""The command line: `warpo train CONFIG.yaml [--key value ...]`."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from warpo.engine.config import Config, load_config
from warpo.engine.config_file import Key, keys, sections
from warpo.engine.errors import WarpoError

USAGE = """\
warpo: reinforcement-learning post-training of language models, sampler and learner in one process.

usage: warpo train CONFIG.yaml [--key value | --section.key value ...]
       warpo train --help      what a run does, an example, every setting
"""

EXAMPLE_YAML = """\
model: models/Qwen2.5-0.5B        # a Hugging Face directory
output_dir: runs/sums
steps: 100
data:
  train: sums.jsonl               # lines like {"prompt": "2+3=", "answer": "5"}
reward:
  function: my_rewards:exact      # def exact(completions, answer): return [...]
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
and my_rewards.py beside it, which gets the completions and the data fields that it names:

    def exact(completions, answer):
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

    warpo train CONFIG.yaml
    warpo train CONFIG.yaml --steps 200 --resume        # a setting of the file, changed
    warpo train CONFIG.yaml --update.betas 0.9 0.95

output_dir then holds metrics.jsonl (one row a step), tensorboard/, learning.png, config.yaml and
checkpoints/step-000100/, which transformers and vLLM load.

Settings:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    match args:
        case [] | ["-h" | "--help", *_]:
            print(USAGE)
            return 0 if args else 2
        case ["train", *rest] if {"-h", "--help"} & set(rest):
            print(train_help())
            return 0
        case ["train", config, *overrides] if not config.startswith("-"):
            return _train(config, overrides)
        case ["train", *_]:
            print("warpo train: the first argument is the YAML file\n\n" + USAGE, file=sys.stderr)
        case [command, *_]:
            print(f"warpo: there is no command {command!r}\n\n{USAGE}", file=sys.stderr)
    return 2


def _train(path: str, overrides: Sequence[str]) -> int:
    try:
        config = load_config(path, overrides)
        # OpenMP reads it when torch loads. Threads that spin while they wait for work starve the
        # sampler's and the learner's of one another: 2 to 6 times slower on 2 cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Loads torch, which a mistyped setting must not wait for.
        from warpo.engine.train import run

        run(config)
    except WarpoError as error:
        print(f"warpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("warpo: interrupted", file=sys.stderr)
        return 130
    return 0


def train_help() -> str:
    """What `warpo train --help` prints, as wide as the terminal, at most 100 columns."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = [TRAIN_HELP.format(yaml=textwrap.indent(EXAMPLE_YAML, "    "))]
    section = ""
    for key in keys(Config).values():
        head = key.name.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", f"{section}: {sections(Config)[section]}"]
        lines += _describe(key, width)
    return "\n".join(lines)


def _describe(key: Key, width: int) -> list[str]:
    default = key.default
    if isinstance(default, tuple):
        default = " ".join(str(part) for part in default)
    if isinstance(default, bool):
        default = str(default).lower()
    tail = "(required)" if key.required else f"(default: {default if default != '' else 'empty'})"
    head, indent = f"  --{key.name}  {key.wanted}  {tail}", " " * 8
    return [
        *textwrap.wrap(head, width, subsequent_indent=indent),
        *textwrap.wrap(key.text, width, initial_indent=indent, subsequent_indent=indent),
    ]


if __name__ == "__main__":
    sys.exit(main())
