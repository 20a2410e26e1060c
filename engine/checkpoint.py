"""Checkpoints: a directory that transformers loads, and beside it what a resumed run needs.

    output_dir/checkpoints/step-000123/   config.json, model.safetensors, tokenizer.json, ...
                                          trainer.pt: step, parts, random states

A checkpoint is written under a hidden name, flushed to disk and renamed: one that bears its name
is complete.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from warpo.engine.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"step-(\d{6,})")
_TRAINER_FILE = "trainer.pt"


class Stateful(Protocol):
    """What has a state to keep: optimizer, scheduler, prompt stream."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def save(
    output_dir: str | Path,
    *,
    step: int,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    parts: Mapping[str, Stateful],
    keep: int,
) -> Path:
    """Write output_dir/checkpoints/step-<step>, all of it or nothing.

    Args:
        model, tokenizer: None where the parts hold all there is.
        parts: objects whose state is kept, by name.
        keep: newest checkpoints that stay; 0: all.
    """
    root = Path(output_dir) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in [*root.glob(".step-*"), *root.glob(".old-*")]:
        shutil.rmtree(leftover)
    final = root / f"step-{step:06d}"
    draft = root / f".{final.name}"
    draft.mkdir()
    for saved in (model, tokenizer):
        if saved is not None:
            saved.save_pretrained(draft)
    state = {
        "step": step,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": random_state(),
    }
    torch.save(state, draft / _TRAINER_FILE)
    _flush(draft)
    if final.exists():
        os.rename(final, root / f".old-{final.name}")
    os.rename(draft, final)
    _flush_directory(root)
    shutil.rmtree(root / f".old-{final.name}", ignore_errors=True)
    _prune(root, keep)
    return final


def latest(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    root = Path(output_dir) / "checkpoints"
    found = complete(root)
    if not found:
        raise CheckpointError(f"{root} holds no checkpoint: start without --resume")
    return found[-1]


def load(path: str | Path, *, model: PreTrainedModel | None, parts: Mapping[str, Stateful]) -> int:
    """Put a checkpoint into `model` (in place, its storage stays), `parts` and the random states.

    Returns:
        The step after which it was saved.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model or other parts.
    """
    path = Path(path)
    try:
        state = torch.load(path / _TRAINER_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} holds no {_TRAINER_FILE}: it is no checkpoint") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path / _TRAINER_FILE} is damaged: {error}") from None
    if state["parts"].keys() != parts.keys():
        raise CheckpointError(
            f"{path} keeps {', '.join(sorted(state['parts']))}, "
            f"this run has {', '.join(sorted(parts))}"
        )
    if model is not None:
        _load_weights(path, model)
    for name, part in parts.items():
        try:
            part.load_state_dict(state["parts"][name])
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: the state of {name} does not fit: {error}") from error
    set_random_state(state["random"])
    return int(state["step"])


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and the current CUDA device."""
    kind, words, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo what was drawn since `random_state`; CUDA's only where both machines have a GPU."""
    kind, words, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _load_weights(path: Path, model: PreTrainedModel) -> None:
    try:
        # float32 holds every value of the narrower types, so a model of mixed types is exact too.
        saved = type(model).from_pretrained(path, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the model does not load: {error}") from error
    own = model.state_dict()
    for name in sorted(own.keys() | saved.keys()):
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(saved[name].shape) if name in saved else "absent"
        if here != there:
            raise CheckpointError(
                f"{path} belongs to another model: {name} is {there} there and {here} here; "
                "set model to the one that the run began with"
            )
    model.load_state_dict(saved)


def complete(root: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    found = [entry for entry in root.glob("step-*") if _NAME.fullmatch(entry.name)]
    found = [entry for entry in found if (entry / _TRAINER_FILE).is_file()]
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def _prune(root: Path, keep: int) -> None:
    for old in complete(root)[:-keep] if keep else []:
        # Renamed first: half a checkpoint must not bear a checkpoint's name.
        os.rename(old, root / f".old-{old.name}")
        shutil.rmtree(root / f".old-{old.name}")


def _flush(directory: Path) -> None:
    for entry in directory.iterdir():
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
