"""Checkpoints: a directory that transformers loads, and next to it what a resumed run needs.

    output_dir/checkpoints/step-000123/   config.json, model.safetensors, tokenizer.json, ...
                                          trainer.pt: step, parts, random states
                                          manifest.json: what all of these hold, step, settings

A checkpoint is written under a hidden name, flushed to disk and renamed: one that bears its name
was complete. It is compared with its manifest before anything of it is used. Weights or optimizer
states that are not finite are not saved.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from warpo.engine.errors import CheckpointError, ConfigError, TrainingError, one_line
from warpo.engine.run import atomic, manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"step-(\d{6,})")
_TRAINER_FILE = "trainer.pt"
# config, tokenizer and manifest besides the tensors of a checkpoint
_SMALL_FILES = 2**20


class Weights(Protocol):
    """A model, or the adapters of one: what a checkpoint keeps in files of safetensors."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def save_pretrained(self, *folder: Any, **options: Any) -> Any: ...


class Stateful(Protocol):
    """An object with a state to keep: optimizer, scheduler, prompt stream."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint whose files are what they were when it was saved.

    Attributes:
        step: after which it was saved.
        settings: settings of the run that saved it, a tree of plain values.
        tensors: descriptions of the tensors of trainer.pt.
    """

    path: Path
    step: int
    settings: dict[str, Any]
    tensors: dict[str, str]


def save(
    output_dir: str | Path,
    *,
    step: int,
    model: Weights | None,
    tokenizer: PreTrainedTokenizerBase | None,
    parts: Mapping[str, Stateful],
    keep: int,
    settings: Mapping[str, Any],
) -> Path:
    """Write output_dir/checkpoints/step-<step>, all of it or nothing.

    Args:
        model, tokenizer: None where the parts hold all there is.
        parts: objects whose state is kept, by name.
        keep: newest checkpoints that stay; 0: all.
        settings: settings of the run, a tree of plain values.

    Raises:
        TrainingError: a weight or a number of the parts' states is not finite.
        CheckpointError: the disk does not take it. Nothing of it is left.
    """
    root = _root(output_dir)
    states = {name: part.state_dict() for name, part in parts.items()}
    _check_finite(output_dir, step, model, states)
    state = {"step": step, "parts": states, "random": random_state()}
    final = root / f"step-{step:06d}"
    with atomic.folder(final, _num_bytes(model, state)) as draft:
        for saved in (model, tokenizer):
            if saved is not None:
                saved.save_pretrained(draft)
        with (draft / _TRAINER_FILE).open("wb") as file:
            atomic.save_state(state, file)
        manifest.write(
            draft, step=step, settings=settings, tensors=manifest.describe(state, _TRAINER_FILE)
        )
    _prune(root, keep)
    return final


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a model and its manifest, all of it or nothing."""
    with atomic.folder(folder, _num_bytes(model, {})) as draft:
        for saved in (model, tokenizer):
            if saved is not None:
                saved.save_pretrained(draft)
        manifest.write(draft)


def rehearse(
    output_dir: str | Path,
    model: Weights,
    tokenizer: PreTrainedTokenizerBase,
    parameters: Iterable[Tensor],
    parts: Mapping[str, Stateful] | None = None,
) -> None:
    """Find out before a run whether it can be saved: all files but those of tensors are written
    and removed, and the disk must have room for a checkpoint.

    Args:
        parameters: that AdamW steps, of all models: 8 bytes per element for its moments, 4 for
            master weights.
        parts: as of `save`, before the first step, so without those.

    Raises:
        CheckpointError: it cannot.
        ConfigError: a weight of the model is not finite.
    """
    if name := first_not_finite(model.named_parameters()):
        raise ConfigError(f"model: its weight {name} is not finite, so it cannot be trained")
    state = sum(p.numel() * (8 if p.dtype == torch.float32 else 12) for p in parameters)
    state += _num_bytes(model, {name: part.state_dict() for name, part in (parts or {}).items()})
    folder = _root(output_dir) / ".step-rehearsal"
    try:
        with atomic.folder(folder, state) as draft:
            model.save_pretrained(draft, state_dict={})
            tokenizer.save_pretrained(draft)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"this model could not be saved after the run: {one_line(error)}"
        ) from error
    shutil.rmtree(folder)


def latest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run by its name; None where there is none."""
    found = complete(_root(output_dir))
    return found[-1] if found else None


def open_latest(output_dir: str | Path) -> Saved | None:
    """The newest checkpoint of a run, compared with its manifest; None where there is none.

    Raises:
        CheckpointError: it is damaged; names what is to be deleted to resume from an older one.
    """
    found = complete(_root(output_dir))
    if not found:
        return None
    try:
        return read(found[-1])
    except CheckpointError as error:
        for place in range(len(found) - 2, -1, -1):
            if _is_whole(found[place]):
                damaged = " and ".join(path.name for path in found[place + 1 :])
                raise CheckpointError(
                    f"{error}; delete {damaged} to resume from {found[place].name}"
                ) from None
        what = found[0] if len(found) == 1 else _root(output_dir)
        raise CheckpointError(f"{error}; delete {what} to start anew") from None


def read(path: str | Path) -> Saved:
    """A checkpoint, compared with its manifest.

    Raises:
        CheckpointError: a file is missing or is not as it was saved.
    """
    path = Path(path)
    body = manifest.check(path)
    for name in (_TRAINER_FILE, "step", "settings"):
        if name not in body and name not in body["files"]:
            raise CheckpointError(f"{path} is not a checkpoint: it was saved without {name}")
    if body["step"] != _step_of(path):
        raise CheckpointError(f"{path} holds step {body['step']} and bears another name")
    own = {name: text for name, text in body["tensors"].items() if name.startswith(_TRAINER_FILE)}
    return Saved(path=path, step=body["step"], settings=body["settings"], tensors=own)


def load(saved: Saved, *, model: Weights | None, parts: Mapping[str, Stateful]) -> int:
    """Put a checkpoint into `model` (in place, its storage stays), `parts` and the random states.

    Returns:
        The step after which it was saved.

    Raises:
        CheckpointError: it belongs to another model or other parts.
    """
    path = saved.path
    state = torch.load(path / _TRAINER_FILE, map_location="cpu", weights_only=True)
    manifest.compare(path, saved.tensors, manifest.describe(state, _TRAINER_FILE))
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
    return saved.step


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


def _load_weights(path: Path, model: Weights) -> None:
    own = model.state_dict()
    files: dict[str, Path] = {}
    for file in sorted(path.glob(manifest.WEIGHTS)):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    # a tensor that two names share is saved under one of them
    written = {own[name].data_ptr() for name in own.keys() & files.keys()}
    shared = {name for name in own.keys() - files.keys() if own[name].data_ptr() in written}
    if own.keys() - shared != files.keys():
        if isinstance(model, nn.Module):
            _check_same(path, own, converted := _converted(path, model))
            model.load_state_dict(converted)
            return
        _check_same(path, own, {n: x for f in {*files.values()} for n, x in load_file(f).items()})
    for name, file in files.items():
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
            _check_same(path, {name: own[name]}, {name: tensor})
            if tensor.dtype != own[name].dtype:
                raise CheckpointError(
                    f"{path} belongs to a run of another dtype: {name} is {tensor.dtype} there "
                    f"and {own[name].dtype} here; set dtype as it was"
                )
            with torch.no_grad():
                own[name].copy_(tensor)


def _converted(path: Path, model: Weights) -> dict[str, Tensor]:
    """The weights by the names of the model, where those of its files are others: transformers
    fuses the experts of some architectures.
    """
    try:
        # float32 holds every value of the narrower types, so a model of mixed types is exact too.
        kind: Any = type(model)
        loaded, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} belongs to another model: {error}") from error
    state: dict[str, Tensor] = loaded.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in report["missing_keys"]}


def _check_same(path: Path, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name in sorted(own.keys() | saved.keys()):
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(saved[name].shape) if name in saved else "absent"
        if here != there:
            raise CheckpointError(
                f"{path} belongs to another model: {name} is {there} there and {here} here; "
                "set model to the one that the run began with"
            )


def complete(root: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    found = [entry for entry in root.glob("step-*") if _NAME.fullmatch(entry.name)]
    return sorted(found, key=_step_of)


def _root(output_dir: str | Path) -> Path:
    return Path(output_dir) / "checkpoints"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except CheckpointError:
        return False
    return True


def _check_finite(
    output_dir: str | Path, step: int, model: Weights | None, parts: Mapping[str, Any]
) -> None:
    named = [] if model is None else list(model.named_parameters())
    if name := first_not_finite([*named, *manifest.tensors_in(parts, "state of the run")]):
        raise TrainingError(
            f"step {step} is not saved, since {name} is not finite: the run has diverged. "
            f"{last_good(output_dir)}"
        )


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in named:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def last_good(output_dir: str | Path) -> str:
    """Suggest what to do about a run whose state is of no use."""
    path = latest(output_dir)
    if path is None:
        return "No checkpoint was saved before: lower the learning rate and start anew"
    return f"Lower the learning rate and --resume from the last good one, {path.name}"


def _num_bytes(model: Weights | None, state: Any) -> int:
    """Estimate the size of a checkpoint on disk; a tensor of two names counts once."""
    named = [] if model is None else list(model.state_dict().items())
    tensors = [tensor for _, tensor in [*named, *manifest.tensors_in(state, "")]]
    different = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
    return sum(different.values()) + _SMALL_FILES


def _prune(root: Path, keep: int) -> None:
    for old in complete(root)[:-keep] if keep else []:
        # Renamed first: half a checkpoint must not bear a checkpoint's name.
        os.rename(old, root / f".old-{old.name}")
        shutil.rmtree(root / f".old-{old.name}")
