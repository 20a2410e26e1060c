"""The command line. What a command needs is imported when it runs: kernels alone need no engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

USAGE = """\
warpo: reinforcement-learning post-training of language models, sampler and learner in one process.

usage: warpo train CONFIG.yaml [--key value | --section.key value ...]
       warpo train --help [ALGORITHM]      what a run does, an example, every setting
       warpo algorithms [NAME | --compare] list the algorithms; NAME shows its defaults; --compare,
                                           how those that sample differ
       warpo check CONFIG.yaml [--plan-only] [--key value ...]
       warpo check --help                  what it proves before a run, and what it prints
       warpo bench [OP ...]                kernels against PyTorch, other trainers and the limits
       warpo doctor [LIBRARY ...]          what is installed, what is wrong with it, and the cure
       warpo kl                            bias and variance of the estimators of the KL
       warpo --version
"""

DOCTOR_HELP = """\
usage: warpo doctor [trl | verl | openrlhf | torchrl | stable_baselines3 ...]

The machine, torch, the backends of the kernels, the packages of the engine and the trainers that
warpo can be put into: what is there, in which version, what is wrong with it, and the cure. A
trainer is imported to see that its functions are the tested ones, which takes seconds.

    warpo doctor
    warpo doctor trl       # of TRL, each function that warpo replaces, by which operations

What is replaced in a process of yours: print(warpo.kernels.integrations.doctor.report()) in it.
Exit status: 0 nothing is wrong; 1 something is, and the last lines say what; 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _command(args)
        status = command()
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, ModuleNotFoundError) and (missing := _missing_packages()):
            from warpo.engine.doctor import INSTALL_ENGINE

            print(
                f"warpo: `warpo {args[0]}` needs packages that are not installed "
                f"({', '.join(missing)}): {INSTALL_ENGINE}",
                file=sys.stderr,
            )
            return 1
        terminal = importlib.import_module("warpo.engine.run.terminal")
        return terminal.exit_status(error, lambda: _commands().output_dir(args))


def _command(args: list[str]) -> Callable[[], int]:
    match args:
        case [] | ["-h" | "--help", *_]:
            return partial(_show, USAGE, 0 if args else 2)
        case ["--version"]:
            return partial(_show, f"warpo {version('warpo')}", 0)
        case ["train", *rest] if {"-h", "--help"} & set(rest):
            names = [word for word in rest if word not in ("-h", "--help")]
            return partial(_commands().show_settings, names)
        case ["algorithms", "-h" | "--help"]:
            return partial(_show, USAGE, 0)
        case ["algorithms", *rest] if len(rest) < 2:
            return partial(_commands().algorithms, *rest)
        case ["bench", *rest]:
            return partial(importlib.import_module("warpo.bench.cli").main, rest)
        case ["kl", *rest]:
            return partial(importlib.import_module("warpo.bench.kl_estimators").main, rest)
        case ["doctor", *libraries]:
            return partial(_doctor, libraries)
        case ["train", config, *overrides] if not config.startswith("-"):
            return partial(_commands().train, config, overrides)
        case ["check", *rest] if {"-h", "--help"} & set(rest):
            return partial(_show, _commands().CHECK_HELP, 0)
        case ["check", config, *overrides] if not config.startswith("-"):
            return partial(_commands().check, config, overrides)
        case ["train" | "check" as command, *_]:
            problem = f"warpo {command}: the first argument is the YAML file"
        case [command, *_]:
            problem = f"warpo: there is no command {command!r}"
    return partial(_misuse, problem)


def _commands() -> Any:
    return importlib.import_module("warpo.engine.commands")


def _missing_packages() -> list[str]:
    from warpo.engine.doctor import packages

    return [package.name for package in packages("engine") if package.installed is None]


def _show(text: str, status: int) -> int:
    print(text)
    return status


def _misuse(problem: str) -> int:
    print(f"{problem}\n\n{USAGE}", file=sys.stderr)
    return 2


def _doctor(libraries: Sequence[str]) -> int:
    if {"-h", "--help"} & set(libraries):
        print(DOCTOR_HELP)
        return 0
    from warpo.engine.doctor import diagnose

    try:
        lines, problems = diagnose(libraries)
    except ValueError as error:
        print(f"warpo doctor: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
