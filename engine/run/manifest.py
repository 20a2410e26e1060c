"""Manifest of a model folder, written next to its files, so that nothing damaged is used.

manifest.json names every tensor of the folder with its type, shape and fingerprint, and every other
file with its size and fingerprint. trainer.pt is in both lists: its bytes are compared before
anything is unpickled, its tensors afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warpo.engine.errors import CheckpointError
from warpo.kernels import ops

FILE = "manifest.json"
WEIGHTS = "*.safetensors"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensors_in(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state, by the path to each."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from tensors_in(value, f"{name}/{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from tensors_in(value, f"{name}/{index}")


def describe(state: Any, name: str) -> dict[str, str]:
    """Type, shape and fingerprint of each tensor of a nested state."""
    return {path: _describe(tensor) for path, tensor in tensors_in(state, name)}


def write(folder: Path, **content: Any) -> None:
    """Describe what the folder holds, and write it there with further content.

    Args:
        content: JSON; `tensors`, a mapping, joins those of the weights.
    """
    tensors = content.pop("tensors", {})
    for file in sorted(folder.glob(WEIGHTS)):
        tensors |= _weights(file)
    others = sorted(set(folder.iterdir()) - set(folder.glob(WEIGHTS)))
    body = content | {"files": {file.name: _bytes(file) for file in others}, "tensors": tensors}
    text = json.dumps(body | {"sha256": _digest(body)}, indent=1)
    (folder / FILE).write_text(text, encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """Compare every file of the folder with its manifest, which is returned.

    Raises:
        CheckpointError: something is missing, was changed, or is not readable.
    """
    body = _read(folder)
    for name, wanted in body["files"].items():
        there = _bytes(folder / name) if (folder / name).is_file() else "missing"
        if there != wanted:
            raise CheckpointError(f"{folder / name} is {_difference(wanted, there)}")
    saved = {k: v for k, v in body["tensors"].items() if k.split("/")[0] not in body["files"]}
    found: dict[str, str] = {}
    for file in sorted(folder.glob(WEIGHTS)):
        found |= _weights(file)
    compare(folder, saved, found)
    return body


def compare(folder: Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare two descriptions of tensors.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    for name in [*wanted, *(found.keys() - wanted.keys())]:
        there, here = found.get(name, "missing"), wanted.get(name, "unknown")
        if there != here:
            file, _, tensor = name.partition("/")
            raise CheckpointError(f"{folder / file}: tensor {tensor} is {_difference(here, there)}")


def _difference(wanted: str, found: str) -> str:
    if found == "missing":
        return "missing"
    if wanted == "unknown":
        return "not one that was saved"
    if wanted.rsplit(" ", 1)[0] != found.rsplit(" ", 1)[0]:
        return f"{found.rsplit(' ', 1)[0]}, and was saved as {wanted.rsplit(' ', 1)[0]}"
    return "damaged: its bits are not those that were saved"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        digest = body.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is damaged") from None
    if digest != _digest(body):
        raise CheckpointError(f"{path} is damaged: it is not as it was saved")
    return body


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _weights(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {
                f"{file.name}/{name}": _describe(tensors.get_tensor(name))
                for name in sorted(tensors.keys())
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _describe(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} {_fingerprint(tensor.detach())}"


def _fingerprint(tensor: Tensor) -> str:
    tensor = tensor.contiguous()
    if tensor.dtype in _FLOATS:
        return f"{ops.fingerprint(tensor).item() % 2**64:016x}"
    # counts and states of generators, which are short
    content = tensor.cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _bytes(file: Path) -> str:
    """Size and fingerprint of the bytes of a file."""
    size = file.stat().st_size
    if not size:
        return "0 bytes -"
    content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    whole, rest = content[: size // 4 * 4], content[size // 4 * 4 :]
    return f"{size} bytes {_fingerprint(whole.view(torch.float32))}{rest.numpy().tobytes().hex()}"
