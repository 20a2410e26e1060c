"""Configs that nobody would write: the examples with lines, values and bytes changed."""

from __future__ import annotations

import random
import re
from pathlib import Path

from tests.examples.configs import config_of
from warpo.engine.commands import read_config
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.file import keys
from warpo.engine.errors import WarpoError

VALUES = (
    "", "~", "null", "true", "-1", "0", "1", "017", "1:30", "1e400", "-0.0", ".nan", ".inf", "0x1F",
    "2026-02-30", "9" * 400, "9" * 5000, "1e-320", "[]", "[[]]", "[1, [2]]", "{}", "{a: {b: c}}",
    "'", '"\\0"', '"\\ud800"', "!!int x", "!!timestamp 2026-02-30", "!!binary '*'", "!!set {a}",
    "!!python/name:os.system x", "&a [*a]", "*absent", "[" * 3000, "{a: " * 3000, "| ", ">-", "%",
    "@", "`", "- - -", "? ", "algorithm", "policy", "same", "auto", "~/x", "http://u:p@h", "a:b",
    "-1 * math", "1e999 * math", "overlong:-1", "overlong:" + "9" * 30, "model:", "length:.",
)  # fmt: skip


def attack(seed: int, folder: Path) -> str | None:
    """None where the config is read or refused in words, else what went wrong."""
    draw = random.Random(seed)
    path = folder / "run.yaml"
    algorithm = draw.choice(list(ALGORITHMS))
    file, words = config_of(algorithm)
    text = re.sub("(?m)^algorithm: .*", f"algorithm: {algorithm}", file.read_text())
    path.write_bytes(_mutated(draw, text))
    # without --algorithm, so that the line of the file decides
    overrides = [*words[2:], *_overrides(draw)]
    try:
        read_config(str(path), overrides)
    except WarpoError as error:
        if not str(error).strip() or len(str(error)) > 20_000:
            return f"a message of {len(str(error))} characters"
    return None


def _mutated(draw: random.Random, text: str) -> bytes:
    lines = text.splitlines()
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        match draw.randrange(6):
            case 0 | 1 | 2:
                lines[at] = f"{key}{colon} {draw.choice(VALUES)}"
            case 3:
                lines.insert(at, lines[draw.randrange(len(lines))])
            case 4:
                del lines[at]
                lines = lines or ["a: 1"]
            case 5:
                lines[at] = draw.choice(["  ", "\t", "- ", "? ", "", "<<: "]) + lines[at]
    data = bytearray("\n".join(lines).encode())
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def _overrides(draw: random.Random) -> list[str]:
    from warpo.engine.config.policy import Config

    words = []
    for _ in range(draw.choice([0, 0, 1, 2])):
        name = draw.choice([*keys(Config), "update", "a.b.c", "", "steps="])
        words += [f"--{name}", *draw.choices(VALUES, k=draw.randrange(3))]
    return words
