"""Damages of a checkpoint, each of which must be refused in one line or leave what is loaded equal.

The checkpoint is that of a small language model with AdamW. `attack` damages a copy by the row of
DAMAGES that the seed chooses, and loads it; `make torture` runs many seeds.
"""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from warpo.engine.errors import WarpoError
from warpo.engine.learner.schedule import make_optimizer
from warpo.engine.run import checkpoint

NEWEST, OLDER = "step-000004", "step-000002"
Damage = Callable[[Path, random.Random], None]


class Settings:
    """The section `update` of a config."""

    lr, betas, weight_decay, optimizer_state, warmup_steps = 1e-2, (0.9, 0.999), 0.0, "device", 0
    schedule = "constant"


def model_of(dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype)


class Position:
    """The state of a stream, of an adaptive coefficient: plain values."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"position": 0, "seed": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


class Run:
    """State that a run keeps."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.model = model_of(dtype, seed)
        self.optimizer, self.schedule = make_optimizer(self.model.named_parameters(), Settings(), 1)
        self.stream = Position()

    @property
    def parts(self) -> dict[str, checkpoint.Stateful]:
        return {"optimizer": self.optimizer, "schedule": self.schedule, "stream": self.stream}

    def learn(self) -> None:
        ids = torch.randint(32, (1, 8))
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.stream.state["position"] += 8

    def bits(self) -> dict[str, Any]:
        """Everything that a resumed run goes on from."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"model": self.model.state_dict(), "random": checkpoint.random_state()}
        return state


def make(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Two checkpoints of a run, of steps 2 and 4."""
    run = Run(dtype)
    for step in range(1, 5):
        run.learn()
        if step % 2 == 0:
            checkpoint.save(
                folder,
                step=step,
                model=run.model,
                tokenizer=None,
                parts=run.parts,
                keep=0,
                settings={"steps": 4, "seed": 0},
            )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.equal(b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """trainer.pt with another content, as torch.save writes it."""
    content = torch.load(path / "trainer.pt", weights_only=True)
    change(content)
    torch.save(content, path / "trainer.pt")


def reweigh(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """model.safetensors with other tensors, as safetensors writes it."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def scramble(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    length = min(len(content) - start, rng.choice((4, 64, 4096)))
    content[start : start + length] = rng.randbytes(length)
    file.write_bytes(content)


def replaced(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _moments(state: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = state["parts"]["optimizer"]["state"]
    return found


def _drop_moment(state: Any, rng: random.Random) -> None:
    del rng.choice(list(_moments(state).values()))[rng.choice(("exp_avg", "exp_avg_sq"))]


def _each_moment(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for moments in _moments(state).values():
        moments["exp_avg"] = change(moments["exp_avg"])


def _other_tensor(
    tensors: dict[str, torch.Tensor], rng: random.Random, change: Callable[[torch.Tensor], Any]
) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = change(tensors[name]).contiguous()


def _rename(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name + "_"] = tensors.pop(name)


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up].clone(), tensors[gate].clone()


def _of_another_step(path: Path, name: str) -> None:
    shutil.copy(path.parent / OLDER / name, path / name)


def _moved(path: Path) -> None:
    """Step 2 in the folder of step 4."""
    shutil.rmtree(path)
    shutil.copytree(path.parent / OLDER, path)


def _emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


FILES = ("model.safetensors", "trainer.pt", "config.json", "manifest.json")
SHAPES = (
    None,
    5,
    "text",
    [],
    {},
    [1, 2],
    (),
    {"step": 4},
    {"parts": {}},
    {"random": {}},
    True,
    1.5,
    {"step": 4, "parts": None, "random": None},
    {"step": "4", "parts": {}, "random": {}},
    torch.zeros(3),
)


def one(change: Callable[[torch.Tensor], Any]) -> Damage:
    """Another value of one of the tensors of model.safetensors."""
    return lambda path, rng: reweigh(path, lambda t: _other_tensor(t, rng, change))


def moments(change: Callable[[torch.Tensor], Any]) -> Damage:
    """Another value of each first moment."""
    return lambda path, _: rewrite(path, lambda state: _each_moment(state, change))


def state(change: Callable[[Any], Any]) -> Damage:
    return lambda path, _: rewrite(path, change)


def part(name: str, change: Callable[[Any], Any]) -> Damage:
    return lambda path, _: rewrite(path, lambda state: change(state["parts"][name]))


def written(file: str, content: bytes) -> Damage:
    return lambda path, _: replaced(path / file, content)


def edited(file: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda path, _: edit_json(path / file, change)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _longer(file: Path) -> None:
    replaced(file, file.read_bytes() + b"x")


DAMAGES: dict[str, Damage] = {
    **{f"{file} missing": lambda p, r, f=file: (p / f).unlink() for file in FILES},
    **{f"{file} empty": written(file, b"") for file in FILES},
    **{f"{file} cut": lambda p, r, f=file: cut(p / f, r) for file in FILES},
    **{f"one bit of {file}": lambda p, r, f=file: flip(p / f, r) for file in FILES},
    **{f"{file} scrambled": lambda p, r, f=file: scramble(p / f, r) for file in FILES},
    **{f"{file} of another step": lambda p, r, f=file: _of_another_step(p, f) for file in FILES},
    **{f"{file} a folder": lambda p, r, f=file: _folder(p / f) for file in FILES},
    **{f"{file} longer": lambda p, r, f=file: _longer(p / f) for file in FILES},
    **{
        f"trainer.pt is {str(shape)[:40]}": lambda p, r, s=shape: torch.save(s, p / "trainer.pt")
        for shape in SHAPES
    },
    "all files missing": lambda p, r: _emptied(p),
    "the folder of another step": lambda p, r: _moved(p),
    "step 99 in trainer.pt": state(lambda s: s.update(step=99)),
    "step 99 in the manifest": edited("manifest.json", lambda m: m.update(step=99)),
    "manifest without tensors": edited("manifest.json", lambda m: m.pop("tensors")),
    "manifest is a list": written("manifest.json", b"[1]"),
    "manifest nested": written("manifest.json", b"[" * 100_000),
    "manifest of numbers": written("manifest.json", b"1" * 6000),
    "rope_theta changed": edited("config.json", lambda c: c.update(rope_theta=5.0)),
    "a tensor missing": lambda p, r: reweigh(p, lambda t: t.pop(r.choice(sorted(t)))),
    "a tensor renamed": lambda p, r: reweigh(p, lambda t: _rename(t, r)),
    "a tensor more": lambda p, r: reweigh(p, lambda t: t.update(extra=torch.zeros(2))),
    "a tensor in bfloat16": one(lambda x: x.float().bfloat16()),
    "a tensor in float32": one(lambda x: x.float()),
    "a tensor in float16": one(lambda x: x.half()),
    "a tensor in float64": one(lambda x: x.double()),
    "a tensor of zeros": one(torch.zeros_like),
    "a tensor of NaN": one(lambda x: x * torch.nan),
    "a tensor of one row": one(lambda x: x[:1]),
    "a tensor flattened": one(lambda x: x.flatten()[None]),
    "two tensors exchanged": lambda p, r: reweigh(p, _swap),
    "the sign of a tensor": one(lambda x: -x),
    "moments emptied": state(lambda s: _moments(s).clear()),
    "a moment missing": lambda p, r: rewrite(p, lambda s: _drop_moment(s, r)),
    "moments of a parameter missing": state(lambda s: _moments(s).popitem()),
    "moments in bfloat16": moments(lambda x: x.bfloat16()),
    "moments of zeros": moments(torch.zeros_like),
    "moments of NaN": moments(lambda x: x * torch.nan),
    "moments as numbers": moments(lambda x: x.tolist()),
    "count of optimizer steps": state(lambda s: _moments(s)[0].update(step=77)),
    "no parameter groups": part("optimizer", lambda o: o.update(param_groups=[])),
    "other names": part("optimizer", lambda o: o["param_groups"][0]["param_names"].reverse()),
    "a part missing": state(lambda s: s["parts"].pop("stream")),
    "a part more": state(lambda s: s["parts"].update(critic={})),
    "position moved": part("stream", lambda o: o.update(position=1)),
    "schedule moved": part("schedule", lambda o: o.update(last_epoch=1)),
    "no random states": state(lambda s: s.pop("random")),
    "other random states": state(lambda s: s["random"]["torch"].add_(1)),
    "random states of text": state(lambda s: s.update(random="x")),
    "unknown key": state(lambda s: s.update(more=1)),
    "pickled code": lambda p, r: torch.save(Position, p / "trainer.pt"),
}


def attack(seed: int, folder: Path) -> str | None:
    """Damage a checkpoint in the empty folder, and load it.

    Returns:
        None where it was refused in one line, or loaded equal; else what went wrong.
    """
    names = list(DAMAGES)
    dtype = (torch.float32, torch.bfloat16)[seed // len(names) % 2]
    return try_damage(names[seed % len(names)], dtype, random.Random(seed), folder)


def try_damage(name: str, dtype: torch.dtype, rng: random.Random, folder: Path) -> str | None:
    whole, expected = _undamaged(dtype)
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = folder / "checkpoints" / NEWEST
    DAMAGES[name](path, rng)
    try:
        saved = checkpoint.open_latest(folder)
        if saved is None:
            return f"{name}: no checkpoint is found"
        run = Run(dtype, seed=2)
        checkpoint.load(saved, model=run.model, parts=run.parts)
    except WarpoError as error:
        text = str(error)
        if "\n" in text:
            return f"{name}: refused in several lines: {text!r}"
        if f"delete {NEWEST} to resume from {OLDER}" not in text or str(path) not in text:
            return f"{name}: refused without the place or the cure: {text}"
        return None
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return None if same(run.bits(), expected) else f"{name}: loaded, and other numbers than saved"


@cache
def _undamaged(dtype: torch.dtype) -> tuple[Path, dict[str, Any]]:
    """A folder to copy, and what a run has that resumes from it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(folder, dtype)
    run = Run(dtype, seed=1)
    saved = checkpoint.open_latest(folder)
    assert saved is not None
    checkpoint.load(saved, model=run.model, parts=run.parts)
    return folder, run.bits()
