"""Sizes at which operations are timed: those of real models and batches, by preset or from a file.

A file is YAML: the name of an operation, or the names of sizes that several have, and a list.

    logprobs:
      - {tokens: 4096, vocabulary: 32000}
    sequences x steps:
      - {sequences: 512, steps: 8192}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from warpo.bench.operation import Operation, Sizes

# vocabulary and hidden size: Qwen2.5 and Qwen3, https://huggingface.co/Qwen (0.5B: 896, 8B: 4096),
# Llama 3, https://huggingface.co/meta-llama (8B: 4096, 70B: 8192), Gemma 3,
# https://huggingface.co/google (4B: 2560)
QWEN, LLAMA, GEMMA = 151936, 128256, 262144

Shapes = Mapping[str, Sequence[Sizes]]

PRESETS: dict[str, Shapes] = {
    "quick": {
        "tokens x vocabulary": [{"tokens": 64, "vocabulary": QWEN}],
        "tokens x hidden x vocabulary": [{"tokens": 64, "hidden": 256, "vocabulary": 32000}],
        "sequences x steps": [{"sequences": 64, "steps": 1024}],
        "sequences x steps x vocabulary": [{"sequences": 4, "steps": 16, "vocabulary": QWEN}],
        "prompts x group": [{"prompts": 128, "group": 8}],
        "pairs x steps": [{"pairs": 32, "steps": 1024}],
        "pairs": [{"pairs": 1024}],
        "rows x columns": [{"rows": 4096, "columns": 6}],
        "rows": [{"rows": 4096}],
        "parameters": [{"parameters": 1 << 20}],
        "tensors x parameters": [{"tensors": 64, "parameters": 1 << 14}],
    },
    # minutes on a laptop: curves over the size
    "laptop": {
        "tokens x vocabulary": [
            *({"tokens": n, "vocabulary": QWEN} for n in (32, 128, 512, 1024)),
            {"tokens": 512, "vocabulary": LLAMA},
            {"tokens": 512, "vocabulary": GEMMA},
        ],
        "tokens x hidden x vocabulary": [
            {"tokens": 256, "hidden": 896, "vocabulary": QWEN},
            {"tokens": 1024, "hidden": 256, "vocabulary": 32000},
        ],
        "sequences x steps": [{"sequences": n, "steps": 2048} for n in (4, 16, 64, 256)],
        "sequences x steps x vocabulary": [
            {"sequences": 4, "steps": n, "vocabulary": QWEN} for n in (32, 128, 256)
        ],
        "prompts x group": [{"prompts": n, "group": 16} for n in (16, 128, 1024)],
        "pairs x steps": [{"pairs": n, "steps": 2048} for n in (2, 16, 128)],
        "pairs": [{"pairs": n} for n in (64, 1024, 16384)],
        "rows x columns": [{"rows": n, "columns": 6} for n in (256, 4096, 65536)],
        "rows": [{"rows": n} for n in (256, 4096, 65536)],
        "parameters": [{"parameters": n} for n in (1 << 16, 1 << 20, 1 << 24)],
        "tensors x parameters": [{"tensors": 338, "parameters": n} for n in (1 << 10, 1 << 14)],
    },
    "h200": {
        "tokens x vocabulary": [
            *({"tokens": n, "vocabulary": QWEN} for n in (4096, 16384)),
            {"tokens": 8192, "vocabulary": LLAMA},
            {"tokens": 8192, "vocabulary": GEMMA},
        ],
        "tokens x hidden x vocabulary": [
            {"tokens": 8192, "hidden": 896, "vocabulary": QWEN},
            {"tokens": 8192, "hidden": 8192, "vocabulary": LLAMA},
            {"tokens": 8192, "hidden": 2560, "vocabulary": GEMMA},
        ],
        "sequences x steps": [
            {"sequences": b, "steps": t} for b, t in ((16, 2048), (256, 8192), (1024, 16384))
        ],
        "sequences x steps x vocabulary": [{"sequences": 8, "steps": 1024, "vocabulary": QWEN}],
        "prompts x group": [{"prompts": n, "group": 16} for n in (64, 1024, 16384)],
        "pairs x steps": [{"pairs": n, "steps": 4096} for n in (16, 256, 2048)],
        "pairs": [{"pairs": n} for n in (64, 4096, 65536)],
        "rows x columns": [{"rows": n, "columns": 17} for n in (256, 65536)],
        "rows": [{"rows": n} for n in (256, 65536)],
        "parameters": [{"parameters": n} for n in (1 << 24, 1 << 28)],
        "tensors x parameters": [{"tensors": 338, "parameters": n} for n in (1 << 14, 1 << 20)],
    },
}


def key_of(operation: Operation) -> str:
    """Under which sizes of the operation stand."""
    return " x ".join(operation.sizes)


def read(path: Path, operations: Mapping[str, Operation]) -> Shapes:
    """The shapes of a file.

    Raises:
        ValueError: it is not as above; the message names the entry.
    """
    import yaml

    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted operations or sizes, each with a list, got {found!r}")
    sizes = {key_of(operation): operation.sizes for operation in operations.values()}
    sizes |= {name: operation.sizes for name, operation in operations.items()}
    for name, entries in found.items():
        if name not in sizes:
            raise ValueError(f"{path}: {name!r} is none of {', '.join(sizes)}")
        for entry in entries if isinstance(entries, list) else [entries]:
            whole = isinstance(entry, dict) and set(entry) == set(sizes[name])
            if not whole or not all(type(n) is int and n > 0 for n in entry.values()):
                raise ValueError(
                    f"{path}: an entry of {name} must give {', '.join(sizes[name])} as whole "
                    f"numbers above 0, got {entry!r}"
                )
    return found


def of(operation: Operation, shapes: Shapes) -> Sequence[Sizes]:
    """Sizes at which an operation is timed; none where the shapes do not mention it."""
    return shapes.get(operation.name) or shapes.get(key_of(operation)) or ()
